"""Known defects of torch on gloo and CPU; two ranks, started once for most of them.

Each was observed to give wrong numbers silently, or to fail, in plain torch 2.13; the checks run in
`trap_run.py` and report their results.
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
    """torch's clipping raises an error for, or miscounts, parameters of several meshes."""
    assert found["norm / norm of the whole"] == pytest.approx(1.0, rel=1e-6)
    assert found["norm after clipping"] == pytest.approx(0.5, rel=1e-4)


def test_a_gloo_group_has_one_worker(found: dict[str, float]) -> None:
    """torch's two threads write one string without a lock; in rare cases both free it."""
    assert found["gloo groups"] > 1
    assert found["gloo threads"] == found["gloo groups"]
    assert found["timeout in seconds"] == 77.0


def test_gloo_groups_share_the_thread_of_communication(found: dict[str, float]) -> None:
    """torch creates one for each group; each wakes up 100 times a second."""
    assert found["threads of communication"] == 1


def test_gloo_uses_the_given_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    run("tests/parallel/gloo_run.py", 1)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    run("tests/parallel/gloo_run.py", 1, code=1)


@pytest.mark.slow
def test_many_operations_in_flight_leave_the_heap_intact() -> None:
    """With two workers, two processes of five crashed before this number, all within 8 seconds."""
    run("tests/parallel/gloo_run.py", 200_000)
