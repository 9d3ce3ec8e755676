"""What the main thread of this rank does: its phase, for the watchdog and the supervisor.

`enter` writes 56 bytes into a shared mapping, which costs about a microsecond.
"""

import ctypes
import mmap
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from configs.health.heartbeat import (
    FOLDER_VARIABLE,
    RECURRING,
    SIZE,
    SUPERVISOR_VARIABLE,
    Beat,
    path_of,
)
from configs.health.settings import HealthConfig

_TIMES = 3.0
"""A recurring phase may last this many times as long as its longest so far."""
_PR_SET_PDEATHSIG = 1


class Heartbeat:
    """The phase of this rank, with the time at which it began."""

    def __init__(self, rank: int = 0, folder: str | None = None) -> None:
        """folder: of the supervisor's files; None: the phase is kept in memory only."""
        self.limits = HealthConfig(hang_s=0, frozen_s=0, unknown_s=0)
        self.beat = Beat(time.monotonic(), 0.0, 0.0, 0, 0, "start")
        self._longest: dict[str, float] = {}
        self._first: dict[str, int] = {}
        self._memory = mmap.mmap(-1, SIZE)
        if folder is not None:
            handle = os.open(path_of(Path(folder), rank), os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.ftruncate(handle, SIZE)
                self._memory = mmap.mmap(handle, SIZE)
            finally:
                os.close(handle)
        self._write()

    def enter(self, phase: str, step: int | None = None, done: int | None = None) -> None:
        """Begin a phase, or a further pass of the same; step and done change where given."""
        last, now = self.beat, time.monotonic()
        if last.recurs:
            # a pass that was longer would have ended the attempt: all processes were stopped
            spent = min(now - last.since, last.limit or self.limits.unknown_s)
            if spent > self._longest.get(last.phase, 0.0):
                self._longest[last.phase] = spent
        step = last.step if step is None else step
        self.beat = Beat(
            now, self._limit(phase, step), self.limits.frozen_s, step,
            last.done if done is None else done, phase,
        )  # fmt: skip
        self._write()

    def configure(self, limits: HealthConfig, device: str) -> None:
        """Use the limits of the experiment. On CUDA `hang_s` is three times as long: the host runs
        ahead, and waits for many operations at once."""
        hang_s = limits.hang_s * (3 if device == "cuda" else 1)
        self.limits = replace(limits, hang_s=hang_s, unknown_s=max(limits.unknown_s, hang_s))
        self.enter(self.beat.phase)

    def silent_s(self) -> float:
        """Seconds since the phase, or its last pass, began."""
        return time.monotonic() - self.beat.since

    def _limit(self, phase: str, step: int) -> float:
        """Seconds after which the phase hangs; 0: never."""
        if not self.limits.hang_s:
            return 0.0
        if phase in RECURRING and self._first.setdefault(phase, step) != step:
            return max(self.limits.hang_s, _TIMES * self._longest.get(phase, 0.0))
        return self.limits.unknown_s

    def _write(self) -> None:
        self._memory[:] = self.beat.pack()


def start_heartbeat(rank: int) -> Heartbeat:
    """The heartbeat of this process; where a supervisor started it, the process ends with it."""
    folder = os.environ.get(FOLDER_VARIABLE)
    supervisor = os.environ.get(SUPERVISOR_VARIABLE, "")
    if supervisor.isdigit() and sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(supervisor):  # it has ended already
            os._exit(os.EX_TEMPFAIL)
    try:
        return Heartbeat(rank, folder)
    except OSError:  # the folder of a supervisor that has ended
        return Heartbeat(rank)
