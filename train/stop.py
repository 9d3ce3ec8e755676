"""Stopping on Ctrl-C, SIGTERM and SIGUSR1 without losing work.

Cluster schedulers send SIGTERM (SLURM: a pre-emption) or the signal that a job selects (SIGUSR1 in
our job scripts, before the end of its time).

The first signal only sets a flag. All ranks check it together before every microbatch, discard the
unfinished step and save; torchrun kills its workers 30 s after the signal, so stopping must not
wait for a long step. A later Ctrl-C interrupts at once.
"""

import os
import signal
import time
from types import FrameType

from parallel.ranks import any_rank

_PATIENCE = 2.0
"""Seconds within which a second SIGINT is treated as the launcher forwarding the first."""


class StopSignal:
    """Records that this process received a signal to stop."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0
        for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(stop, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.number is not None and time.monotonic() - self._since > _PATIENCE
        if number == signal.SIGINT and again:
            raise KeyboardInterrupt
        if self.number is None:
            self.number, self._since = number, time.monotonic()

    def agreed(self) -> bool:
        """Whether any rank received the signal; the same on all ranks."""
        return any_rank(self.number is not None)

    @property
    def exit_code(self) -> int:
        """75 (EX_TEMPFAIL) after SIGTERM or SIGUSR1: the state is saved, and a supervisor should
        start the same command again. 130 after Ctrl-C, as in a shell."""
        return 128 + signal.SIGINT if self.number == signal.SIGINT else os.EX_TEMPFAIL
