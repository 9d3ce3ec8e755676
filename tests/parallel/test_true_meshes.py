"""Every shipped experiment at its real number of ranks, with a process group that moves nothing.

Each rank's share is built on the meta device, so that a mesh of 1,024 ranks takes seconds; what is
looked at are mesh shapes, divisibility and the bytes that the last and the first rank hold.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs.degrees import default_world, resolve
from configs.loader import load
from models.counts import parameter_counts
from tests.runs import ROOT, environment

EXPERIMENTS = sorted((ROOT / "configs").glob("*.toml"))


def held(path: Path, rank: int) -> dict[str, int]:
    """Parameters that one rank holds, in elements, as its own process counts them."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.true_mesh_run", str(path), str(rank)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_rank_holds_its_share(path: Path) -> None:
    config = load(path)
    degrees = resolve(config, default_world(config))
    counts = parameter_counts(config.model)
    share = (counts.total - counts.experts) / (degrees.dp_shard * degrees.tp)
    share += counts.experts / (degrees.efsdp * degrees.ep * degrees.etp)
    first, last = held(path, 0), held(path, degrees.world - 1)
    # vectors that the ranks cannot divide evenly are rounded up on the first
    assert first["elements"] == pytest.approx(share, rel=0.01)
    assert last["elements"] <= first["elements"]
    assert first["meshes"] == {
        "dense": [degrees.dp_replicate, degrees.dp_shard, degrees.tp],
        "whole": [degrees.dp_replicate, degrees.dp_shard * degrees.tp],
        "expert": [degrees.dp_replicate, degrees.efsdp, degrees.ep, degrees.etp],
    }
