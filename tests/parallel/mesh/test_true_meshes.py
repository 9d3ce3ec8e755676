"""Every shipped experiment at its real number of ranks, with a process group without communication.

Each rank's share is built on the meta device, so that a mesh of 1,024 ranks takes seconds. The
tests check mesh shapes, divisibility and the bytes of the first and last rank. Layers are alike, so
the default run builds one of every shape; the tests with all layers are marked slow.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.loader import load
from configs.parallel_dims import default_world, resolve
from models.counts import parameter_counts
from tests.runs import ROOT, run

EXPERIMENTS = sorted((ROOT / "configs").glob("*.toml"))


def held(which: int, path: Path, *overrides: str) -> dict[str, Any]:
    """Shares of the first or last rank, in a separate process, because torch caches a mesh's
    coordinates by its shape."""
    done = run("-m", "tests.parallel.mesh.true_mesh_run", which, path, *overrides)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("layers", ["few", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_rank_holds_its_share(path: Path, layers: str) -> None:
    model, overrides = load(path).model, list[str]()
    if layers == "few":
        dense = min(model.n_dense_layers, 1)
        overrides = [f"--model.n_dense_layers={dense}"]
        overrides += [f"--model.n_layers={max(dense + 1, model.moe_every)}"]
    config = load(path, overrides)
    parallel_dims = resolve(config, default_world(config))
    counts = parameter_counts(config.model)
    share = (counts.total + counts.mtp - counts.experts) / (
        parallel_dims.dp_shard * parallel_dims.tp
    )
    share += counts.experts / (parallel_dims.efsdp * parallel_dims.ep * parallel_dims.etp)
    first, last = (held(which, path, *overrides) for which in (0, -1))
    # vectors that the ranks cannot divide evenly are rounded up on the first
    assert first["elements"] == pytest.approx(share, rel=0.01)
    assert last["elements"] <= first["elements"]
    assert first["meshes"] == {
        "dense": [parallel_dims.dp_replicate, parallel_dims.dp_shard, parallel_dims.tp],
        "whole": [parallel_dims.dp_replicate, parallel_dims.dp_shard * parallel_dims.tp],
        "expert": [
            parallel_dims.dp_replicate,
            parallel_dims.efsdp,
            parallel_dims.ep,
            parallel_dims.etp,
        ],
    }
