"""Training with every dispatcher gives the same weights, including overflow.

Tolerance: 1e-5 of each tensor's norm in fp32, for sums in another order; a repeated step must equal
that of the exact dispatcher bit by bit. (`test_mesh_equality.py` compares the exact
dispatcher with a single process.)
"""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.loader import load
from configs.parallel_dims import resolve
from parallel.dispatch.deepep import elastic_buffer
from tests.runs import TINY, run

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("ranks", "ep"), [(2, 2), pytest.param(4, 4, marks=SLOW), pytest.param(4, 2, marks=SLOW)]
)
def test_every_dispatcher_trains_alike(ranks: int, ep: int, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    run("tests/parallel/dispatch/dispatch_training_run.py", out, ep, ranks=ranks)
    results: dict[str, Any] = json.loads(out.read_text())
    for name in ("overlapped", "sync_free", "hierarchical"):
        assert results[name]["difference"] <= 1e-5, (name, results[name])
    assert results["sync_free-redone"]["difference"] == 0
    # e4m3 has 3 bits of mantissa: a row has an error of 2.6 percent of its norm
    assert 1e-4 < results["fp8"]["difference"] < 0.2
    stopped = results["sync_free-stopped"]
    assert "layers.1.ffn" in stopped["stopped"] and "capacity_factor = 0.3" in stopped["stopped"]
    assert not stopped["changed"]
    check_fields(results, ranks)


def check_fields(results: dict[str, Any], ranks: int) -> None:
    """The scalars of the first step: 2 microbatches of 8 sequences of 32 tokens, 2 experts each."""
    rows = 2 * 8 * 32 * 2 / ranks
    fields = {name: result.get("fields") for name, result in results.items()}
    for name in ("all_to_all", "overlapped", "sync_free", "hierarchical"):
        assert fields[name]["moe/layer_0/rows_received"] == rows
        assert 0 < fields[name]["moe/layer_1/rows_sent"] < rows
        assert fields[name]["moe/layer_1/rank_max_over_mean"] > 1
        assert fields[name]["dispatch_redone"] == 0
    assert fields["sync_free-redone"]["dispatch_redone"] == 1
    assert fields["sync_free-redone"]["moe/layer_0/capacity_use"] > 1
    assert 0 < fields["sync_free"]["moe/layer_0/capacity_use"] <= 1
    assert "moe/layer_0/capacity_use" not in fields["all_to_all"]
    sent = {name: fields[name]["moe/layer_0/dispatch_mib"] for name in fields if fields[name]}
    assert 0.25 < sent["fp8"] / sent["all_to_all"] < 1
    assert sent["overlapped"] == sent["all_to_all"] < sent["sync_free"]
    assert 0 < fields["hierarchical"]["moe/layer_0/between_nodes_mib"] <= sent["hierarchical"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kind=all2all", "did you mean all_to_all?"),
        ("chunks=0", "chunks = 0: must lie between 1 and 64"),
        ("capacity_factor=0", "capacity_factor = 0.0: must lie between"),
        ("dispatch_dtype=fp4", "must be one of compute, fp8"),
    ],
)
def test_refusals_are_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load(TINY, [f"--parallel.dispatch.{override}"])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert f"parallel.dispatch.{override.split('=')[0]}" in str(error.value)


def test_nodes_must_divide_the_ranks() -> None:
    config = load(
        TINY, ["--parallel.dispatch.kind=hierarchical", "--parallel.dispatch.node_size=3"]
    )
    with pytest.raises(UserError, match=r"node_size = 3: must divide parallel.ep = 4.* 1, 2$"):
        resolve(config, 4)


def test_deepep_is_missing_here() -> None:
    with pytest.raises(UserError, match='kind = "deepep": DeepEP is not installed here'):
        elastic_buffer()


def test_deepep_refuses_what_it_cannot() -> None:
    for override in ("chunks=2", "dispatch_dtype=fp8"):
        with pytest.raises(UserError, match="kind = deepep"):
            load(TINY, ["--parallel.dispatch.kind=deepep", f"--parallel.dispatch.{override}"])
