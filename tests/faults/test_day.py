"""A day of faults in a few minutes, on four ranks: what each costs, and equal bits at the end."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests import forks
from tests.faults.supervised import (
    INJECTED,
    MESHES,
    PATIENT,
    Supervised,
    final_weights,
    kill_all,
    losses,
    supervised,
)
from tests.faults.test_faults import ready
from tests.runs import TINY, run

pytestmark = pytest.mark.skipif(not forks.POSSIBLE, reason="Linux only")
EVENTS = ["--kill-rank", "--freeze", "--skip-collective", "--disk-full", "preemption", "--flip-bit",
          "--freeze", "--kill-rank", "node loss", "--skip-collective", "--kill-rank"]  # fmt: skip
STEPS = 300


def next_step(running: Supervised, start: float, position: int) -> float:
    """Seconds from a fault to the first step of the next attempt."""
    position = running.wait_for("attempt .* starts from", 90, position).end()
    running.wait_for_step(90, position)
    return time.monotonic() - start


@pytest.mark.slow
def test_a_day_of_faults(overrides: list[str], tmp_path: Path) -> None:
    words = [word for word in overrides if not word.startswith("--run.dir")]
    words += [f"--train.steps={STEPS}", "--checkpoint.every=5", "--validation.sequences=4"]
    options = [INJECTED, *PATIENT, "--health.hang_s=10", *words]
    folder, lost = tmp_path / "run", dict[str, list[float]]()
    events = list(enumerate(EVENTS))
    while events:
        with supervised(folder, 4, options) as running:
            position = len(running.said)
            ready(running, position)
            while events:
                i, event = events.pop(0)
                time.sleep(1.0)
                start, position = time.monotonic(), len(running.said)
                if event == "--disk-full":  # checkpoints fail for some steps; training continues
                    running.inject(event, i % 4, "--steps", 12)
                    running.wait_for("training continues", 60, position)
                    position = len(running.said)
                    running.wait_for("saved .*step-", 60, position)
                    lost.setdefault(event, []).append(0.0)
                    continue
                if event == "--flip-bit":  # the next start uses the checkpoint before
                    running.inject("--freeze", i % 4)  # no newer checkpoint is written
                    time.sleep(0.5)
                    running.inject(event)
                    running.inject("--kill-rank", i % 4)
                    running.wait_for("damaged, not used", 90, position)
                    lost.setdefault(event, []).append(next_step(running, start, position))
                    ready(running, position)
                    continue
                if event.startswith("--"):
                    running.inject(event, i % 4)
                    lost.setdefault(event, []).append(next_step(running, start, position))
                    ready(running, position)
                    continue
                if event == "preemption":
                    os.kill(running.process.pid, signal.SIGTERM)
                    assert running.finish(60) == 75
                else:
                    kill_all(running)
                lost.setdefault(event, []).append(time.monotonic() - start)
                break
    with supervised(folder, 4, options) as running:
        assert running.finish(600) == 0, running.said[-3000:]
        said = running.said
    assert "Traceback" not in said
    whole = tmp_path / "whole"
    run("-m", "train", TINY, *MESHES[4], *words, f"--run.dir={whole}", ranks=4)
    assert losses(folder) == losses(whole) and len(losses(whole)) == STEPS
    assert final_weights(folder) == final_weights(whole)
    total = sum(map(sum, lost.values()))
    shown = ", ".join(f"{name.strip('-')} {max(times):.1f} s" for name, times in lost.items())
    print(f"\n{len(EVENTS)} faults, longest of each: {shown}; {total:.0f} s in all, "
          f"{total / 864:.3f} percent of a day; bits equal")  # fmt: skip
    assert total < 0.05 * 86_400
