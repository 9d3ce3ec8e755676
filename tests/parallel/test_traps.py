"""Known traps of torch on gloo and CPU, one test each; two ranks, started once.

Each was seen to give wrong numbers silently, or to fail, in plain torch 2.13; the checks run in
`trap_run.py` and report what they found.
"""

import json
from pathlib import Path

import pytest

from tests.runs import run


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    out: Path = tmp_path_factory.mktemp("traps") / "found.json"
    run("tests/parallel/trap_run.py", out, ranks=2)
    return dict(json.loads(out.read_text()))


def test_gradients_are_summed_without_premultiplied_reductions(found: dict[str, float]) -> None:
    """gloo has no PREMUL_SUM, which FSDP2 uses once a divide factor is set."""
    assert found["dense gradient / sum over ranks"] == pytest.approx(1.0, rel=1e-6)


def test_a_shard_mesh_of_one_rank_divides_nothing(found: dict[str, float]) -> None:
    """With ep = 2 on two ranks an expert's FSDP group has one rank; torch 2.13 divides twice."""
    assert found["expert gradient / sum over ranks"] == pytest.approx(1.0, rel=1e-6)


def test_ranks_start_from_different_shards(found: dict[str, float]) -> None:
    """DTensor's random numbers repeat on every CPU rank."""
    assert found["equal shards"] == 0
    assert found["distance from the whole"] == 0.0


def test_the_norm_spans_meshes(found: dict[str, float]) -> None:
    """torch's clipping refuses, or miscounts, parameters of several meshes."""
    assert found["norm / norm of the whole"] == pytest.approx(1.0, rel=1e-6)
    assert found["norm after clipping"] == pytest.approx(0.5, rel=1e-4)
