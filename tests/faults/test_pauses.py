"""Processes that are stopped for some time and continue: nobody is blamed, nothing is lost."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests import forks
from tests.faults.supervised import INJECTED, PATIENT, Supervised, losses, supervised
from tests.faults.test_faults import ready, words

pytestmark = pytest.mark.skipif(not forks.POSSIBLE, reason="Linux only")
SHORT = ["--health.hang_s=3", "--health.frozen_s=3"]
"""With the supervisor's margin, a rank may be silent for 11 s in a step."""


def descendants(pid: int) -> list[int]:
    """A process and all processes that it started."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += descendants(int(child))
    return found


def steps_after(running: Supervised, seconds: float) -> None:
    """Wait for a step that begins after so many seconds."""
    position = len(running.said)
    running.wait_for_step(60, position)
    time.sleep(seconds)
    running.wait_for_step(60, len(running.said))


@pytest.mark.slow
def test_a_pause_of_all_processes(overrides: list[str], tmp_path: Path) -> None:
    """As Ctrl-Z on a terminal, a frozen container, a paused virtual machine."""
    with supervised(tmp_path / "run", 2, [*SHORT, *words(overrides)]) as running:
        ready(running)
        running.wait_for(r"(?m)^step +10/", 60)
        for _ in range(3):
            everyone = descendants(running.process.pid)
            for pid in everyone:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(16)
            for pid in everyone:
                os.kill(pid, signal.SIGCONT)
            steps_after(running, 5)
        os.kill(running.process.pid, signal.SIGTERM)
        assert running.finish(60) == 75
        said = running.said
    assert "error" not in said and "attempt" not in said, said
    print("\n3 pauses of 16 s of all processes, limits of 3 s: no alarm")


@pytest.mark.slow
def test_a_stopped_supervisor(overrides: list[str], tmp_path: Path) -> None:
    """The ranks go on without it, end if one of them is killed, and it starts them again when it
    continues."""
    with supervised(tmp_path / "run", 2, [INJECTED, *PATIENT, *words(overrides)]) as running:
        ready(running)
        os.kill(running.process.pid, signal.SIGSTOP)
        before = running.pids()
        time.sleep(10)
        assert running.pids() == before
        position = len(running.said)
        running.inject("--kill-rank", 1)
        time.sleep(8)
        os.kill(running.process.pid, signal.SIGCONT)
        running.wait_for("rank 1 was killed by SIGKILL", 20, position)
        running.wait_for_step(60, running.wait_for("starts from", 20, position).end())
        os.kill(running.process.pid, signal.SIGTERM)
        assert running.finish(60) == 75
        assert "Traceback" not in running.said
    steps = losses(tmp_path / "run")
    assert sorted(steps) == list(range(1, max(steps) + 1))
