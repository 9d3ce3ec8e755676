"""One random bit flip anywhere in the newest checkpoint: it is noticed, and the run starts from the
one before."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel.ranks import Ranks, start_ranks, stop_ranks
from tests.faults.checkpoint_folder import CheckpointFolder
from train.checkpoint import resume


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    yield start_ranks(threads=1)
    stop_ranks()


@pytest.mark.parametrize("flips", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_noticed(
    flips: int, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "_PAUSE_S", 0.0)
    folder, rng = CheckpointFolder(tmp_path), random.Random(flips)
    folder.write(4), folder.write(8)
    noticed = silent = fell_back = 0
    for _ in range(flips):
        newest = folder.root / "step-00000008"
        files = sorted(newest.iterdir())
        # every bit of the checkpoint with the same probability
        file = rng.choices(files, [path.stat().st_size for path in files])[0]
        content = file.read_bytes()
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        start, live = folder.restart(ranks)
        noticed += any(re.search(f"damaged, not used: .*{file.name}", line) for line in start.lines)
        silent += start.done == 8
        fell_back += start.done == 4 and folder.is_state(live, 4)
        aside = folder.root / "damaged-step-00000008"
        assert (aside / file.name).read_bytes() == damaged
        (aside / file.name).write_bytes(content)
        aside.rename(newest)
    print(f"{flips} flips: {noticed} noticed, {silent} silent, {fell_back} fell back")
    assert (noticed, silent, fell_back) == (flips, 0, flips)
    start, live = folder.restart(ranks)
    assert start.done == 8 and folder.is_state(live, 8), "the undamaged one is used"


def test_damaged_ones_are_bounded_and_a_loop_ends(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every newest checkpoint of a run is damaged, again and again: each costs one restart."""
    monkeypatch.setattr(resume, "_PAUSE_S", 0.0)
    folder = CheckpointFolder(tmp_path)
    folder.write(4)
    for _ in range(6):
        for step in (8, 12):
            file = folder.write(step) / "rank-00001.safetensors"
            file.write_bytes(file.read_bytes()[:-3])
        start, live = folder.restart(ranks)
        assert start.done == 4 and folder.is_state(live, 4)
        again, _ = folder.restart(ranks)
        assert len(again.lines) == 1, "each is read once"
    assert len(list(folder.root.glob("damaged-*"))) == 2, "disk space is bounded"


def test_a_read_error_that_passes_is_no_damage(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "_PAUSE_S", 0.0)
    folder = CheckpointFolder(tmp_path)
    folder.write(4), folder.write(8)
    real, fails = resume.faults_of_files, [True]

    def faults(*arguments: object) -> dict[str, str]:
        return {"rank-00000.safetensors": "stale handle"} if fails.pop() else {}

    fails = [False, True]
    monkeypatch.setattr(resume, "faults_of_files", faults)
    start, _ = folder.restart(ranks)
    assert start.done == 8 and start.lines[0].startswith("resuming")
    monkeypatch.setattr(resume, "faults_of_files", real)
    assert folder.steps() == [4, 8]
