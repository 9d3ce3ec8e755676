"""Every shipped experiment at its real number of ranks, with a process group without communication.

Each rank's share is built on the meta device, so that a mesh of 1,024 ranks takes seconds. The
tests check mesh shapes, divisibility and the bytes of the first and last rank. Layers are alike, so
the default run builds a few; the tests with all layers are marked slow.
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


SOME = 4
"""At least one layer of every kind."""


def held(which: int, path: Path, *overrides: str) -> dict[str, Any]:
    """Shares of the first or last rank, in a separate process, because torch caches a mesh's
    coordinates by its shape."""
    done = run("-m", "tests.parallel.mesh.true_mesh_run", which, path, *overrides)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("layers", [SOME, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_rank_holds_its_share(path: Path, layers: int) -> None:
    layers = min(layers, load(path).model.n_layers)
    overrides = [f"--model.n_layers={layers}"]
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
