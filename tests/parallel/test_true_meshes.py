"""Every shipped experiment at its real number of ranks, with a process group that moves nothing.

Each rank's share is built on the meta device, so that a mesh of 1,024 ranks takes seconds; what is
looked at are mesh shapes, divisibility and the bytes that the last and the first rank hold.
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


def held(which: int, path: Path) -> dict[str, Any]:
    """What the first or last rank holds, in a process of its own: torch remembers a mesh's
    coordinates by its shape."""
    found: dict[str, Any] = json.loads(
        run("-m", "tests.parallel.true_mesh_run", which, path).stdout
    )
    return found[path.stem]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_rank_holds_its_share(path: Path) -> None:
    config = load(path)
    parallel_dims = resolve(config, default_world(config))
    counts = parameter_counts(config.model)
    share = (counts.total + counts.mtp - counts.experts) / (
        parallel_dims.dp_shard * parallel_dims.tp
    )
    share += counts.experts / (parallel_dims.efsdp * parallel_dims.ep * parallel_dims.etp)
    first, last = (held(which, path) for which in (0, -1))
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
