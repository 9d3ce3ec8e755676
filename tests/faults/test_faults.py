"""Faults in a supervised training of two ranks: each is named and survived."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests import forks
from tests.faults.supervised import (
    INJECTED,
    PATIENT,
    Supervised,
    final_weights,
    losses,
    supervised,
)
from tests.runs import TINY, run

pytestmark = pytest.mark.skipif(not forks.POSSIBLE, reason="Linux only")
ENDLESS = ["--train.steps=100000", "--schedule.steps=100000", "--checkpoint.every=2",
           "--validation.sequences=4"]  # fmt: skip


def words(overrides: list[str], *more: str) -> list[str]:
    return [*(word for word in overrides if not word.startswith("--run.dir")), *ENDLESS, *more]


def ready(running: Supervised, position: int = 0) -> None:
    """Wait until the ranks of the attempt have done steps and published their processes."""
    running.wait_for_step(90, position)
    deadline = time.monotonic() + 30
    path = running.folder / "processes.json"

    def published() -> list[int]:
        return [int(at["pid"]) for at in json.loads(path.read_bytes()).values()]

    while not (path.is_file() and sorted(running.pids().values()) == sorted(published())):
        assert time.monotonic() < deadline, (running.pids(), path.read_text())
        time.sleep(0.02)


@pytest.mark.long
def test_a_sequence_of_faults(overrides: list[str], tmp_path: Path) -> None:
    """A killed rank, a skipped collective, a frozen rank; then a stop, and the rest is equal to an
    uninterrupted run."""
    options = [INJECTED, *PATIENT, "--health.frozen_s=2", "--health.hang_s=3"]
    folder = tmp_path / "run"
    with supervised(folder, 2, [*options, *words(overrides)]) as running:
        ready(running)
        position = len(running.said)
        start = time.monotonic()
        running.inject("--kill-rank", 1)
        running.wait_for("rank 1 was killed by SIGKILL in .* of step", 5, position)
        assert time.monotonic() - start < 3
        ready(running, running.said.index("starts from", position))
        position = len(running.said)
        running.inject("--skip-collective", 0)
        line = running.wait_for("error: .*", 40, position)[0]
        assert re.search("rank 0 (entered|did not enter) .*all_reduce.* number", line), line
        ready(running, running.wait_for("starts from", 20, position).end())
        position = len(running.said)
        running.inject("--freeze", 1)
        line = running.wait_for("error: .*", 30, position)[0]
        assert re.search("rank 1 .* is stopped, last in .*rank 0 waits for it in", line), line
        stacks = (folder / "stacks" / "rank-00000.txt").read_text()
        assert "Thread" in stacks and "trainer.py" in stacks
        ready(running, running.wait_for("starts from", 20, position).end())
        os.kill(running.process.pid, signal.SIGTERM)
        assert running.finish(40) == 75, running.said[-2000:]
        said = running.said
    assert "Traceback" not in said and "gloo" not in said, said
    steps = max(losses(folder))
    assert sorted(losses(folder)) == list(range(1, steps + 1))
    logs = sorted(path.name for path in (folder / "launch").glob("attempt-*"))
    assert logs == [f"attempt-{n:04}" for n in range(1, 5)]
    rest = [w for w in words(overrides) if not w.startswith("--train.steps")]
    run("-m", "train", TINY, "--parallel.ep=2", *rest, f"--train.steps={steps}",
        f"--run.dir={tmp_path / 'whole'}", "--checkpoint.async_save=false",
        f"--checkpoint.every={steps}", ranks=2)  # fmt: skip
    assert losses(tmp_path / "whole") == losses(folder)
    assert final_weights(tmp_path / "whole") == final_weights(folder)


@pytest.mark.slow
def test_a_frozen_rank_is_named_ten_times(overrides: list[str], tmp_path: Path) -> None:
    """With the default limits, on four ranks."""
    times = []
    with supervised(tmp_path / "run", 4, [INJECTED, *PATIENT, *words(overrides)]) as running:
        position = 0
        for i in range(10):
            ready(running, position)
            position, start = len(running.said), time.monotonic()
            running.inject("--freeze", i % 4)
            found = running.wait_for(r"error: .*rank (\d) .*(is|has been) stopped", 60, position)
            times.append(time.monotonic() - start)
            assert int(found[1]) == i % 4
            position = running.wait_for("starts from", 20, position).end()
        ready(running, position)
    assert max(times) < 30
    print(f"\nSIGSTOP: 10 of 10 named, after {min(times):.1f} to {max(times):.1f} s")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_a_skipped_collective_on_four_ranks(
    rank: int, overrides: list[str], tmp_path: Path
) -> None:
    more = [INJECTED, *PATIENT, "--health.hang_s=4"]
    with supervised(tmp_path / "run", 4, [*more, *words(overrides)]) as running:
        ready(running)
        position = len(running.said)
        running.inject("--skip-collective", rank)
        line = running.wait_for("error: .*", 60, position)[0]
        assert re.search(f"rank {rank} (entered|did not enter) .*all_reduce.* number", line), line
        ready(running, running.wait_for("starts from", 30, position).end())


@pytest.mark.slow
def test_nan_on_one_rank_skips_one_step_everywhere(overrides: list[str], tmp_path: Path) -> None:
    with supervised(tmp_path / "run", 2, [INJECTED, *words(overrides)]) as running:
        ready(running)
        position = len(running.said)
        running.inject("--nan", 1)
        found = running.wait_for(r"step (\d+): the loss is nan on rank 1; .*: skipped, 1", 30)
        running.wait_for_step(30, running.said.index("skipped, 1", position))
        os.kill(running.process.pid, signal.SIGTERM)
        assert running.finish(40) == 75
    steps = sorted(losses(tmp_path / "run"))
    assert [*range(1, steps[-1] + 1)] == sorted([*steps, int(found[1])])


@pytest.mark.slow
@pytest.mark.parametrize("percent", [10, 20, 50])
def test_a_slow_rank_is_named_within_20_steps(
    percent: int, overrides: list[str], tmp_path: Path
) -> None:
    more = ["--model.d_model=128", "--data.seq_len=128"]
    with supervised(tmp_path / "run", 2, [INJECTED, *words(overrides, *more)]) as running:
        ready(running)
        running.wait_for(r"(?m)^step +30/", 120)
        running.inject("--slow", 1, "--percent", percent)
        start = int(running.wait_for(r"slow .* at step (\d+)", 30)[1])
        found = running.wait_for(r"step (\d+): rank 1 is slow", 200)
        assert int(found[1]) - start <= 20
