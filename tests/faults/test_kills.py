"""kill -9 of ranks, and of everything, at random moments: the curve keeps its bits."""

import os
import random
import signal
import statistics
import time
from pathlib import Path

import pytest

from tests import forks
from tests.faults.supervised import (
    MESHES,
    PATIENT,
    Supervised,
    final_weights,
    kill_all,
    losses,
    supervised,
)
from tests.runs import TINY, run

pytestmark = pytest.mark.skipif(not forks.POSSIBLE, reason="Linux only")


def uninterrupted(folder: Path, ranks: int, words: list[str]) -> None:
    run("-m", "train", TINY, *MESHES[ranks], *words, f"--run.dir={folder}", ranks=ranks)


def kill_rank(running: Supervised, source: random.Random) -> float:
    """Kill a random rank, once all run; returns the time until the next step in seconds."""
    deadline = time.monotonic() + 60
    while len(pids := running.pids()) < running.ranks:
        assert time.monotonic() < deadline and running.process.poll() is None, running.said[-2000:]
        time.sleep(0.01)
    position = len(running.said)
    start = time.monotonic()
    os.kill(pids[source.randrange(running.ranks)], signal.SIGKILL)
    running.wait_for(r"attempt \d+ starts", 30, position)
    running.wait_for_step(90, running.said.index("starts from the newest", position))
    return time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kills"), [(2, 25), (4, 25)])
def test_a_killed_rank_costs_a_restart_and_no_bit(
    ranks: int, kills: int, overrides: list[str], tmp_path: Path
) -> None:
    """As many runs as it takes for so many kills, each equal to the uninterrupted one."""
    source = random.Random(ranks)
    words = [*overrides, "--train.steps=120", "--checkpoint.every=4", "--validation.sequences=4"]
    words = [word for word in words if not word.startswith("--run.dir")]
    whole = tmp_path / "whole"
    uninterrupted(whole, ranks, words)
    times: list[float] = []
    rounds = 0
    while len(times) < kills:
        folder, rounds = tmp_path / f"run-{rounds}", rounds + 1
        with supervised(folder, ranks, [*PATIENT, *words]) as running:
            running.wait_for_step(120)
            while len(times) < kills and max(losses(folder), default=0) < 100:
                # from the start of loading to some steps and saves later
                time.sleep(source.uniform(0, 2.0))
                times.append(kill_rank(running, source))
            assert running.finish(600) == 0, running.said[-3000:]
        assert "Traceback" not in running.said and "gloo" not in running.said
        assert losses(folder) == losses(whole) and len(losses(whole)) == 120
        assert final_weights(folder) == final_weights(whole)
    print(
        f"\n{ranks} ranks: {len(times)} kills in {rounds} runs, bits equal; kill to next step: "
        f"median {statistics.median(times):.1f} s, longest {max(times):.1f} s"
    )


@pytest.mark.slow
def test_a_kill_of_everything_costs_no_bit(overrides: list[str], tmp_path: Path) -> None:
    source = random.Random(0)
    words = [*overrides, "--train.steps=300", "--checkpoint.every=4", "--validation.sequences=4"]
    words = [word for word in words if not word.startswith("--run.dir")]
    for _ in range(20):
        with supervised(tmp_path / "run", 2, [*PATIENT, *words]) as running:
            time.sleep(source.uniform(4.0, 12.0))
            assert running.process.poll() is None, running.said[-2000:]
            kill_all(running)
    with supervised(tmp_path / "run", 2, [*PATIENT, *words]) as running:
        assert running.finish(300) == 0, running.said[-3000:]
    uninterrupted(tmp_path / "whole", 2, words)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert final_weights(tmp_path / "run") == final_weights(tmp_path / "whole")
