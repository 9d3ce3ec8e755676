"""Stopping on Ctrl-C and SIGTERM without losing work.

The first signal only sets a flag. All ranks look at it together before every microbatch, leave the
unfinished step behind and save; torchrun kills its workers 30 s after the signal, so the way out
must not wait for a long step. A later Ctrl-C interrupts at once.
"""

import signal
import time
from types import FrameType

from parallel.ranks import any_rank

_PATIENCE = 2.0
"""Seconds within which a second SIGINT is taken for the launcher passing on the first."""


class StopSignal:
    """Remembers that this process was asked to stop."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.number is not None and time.monotonic() - self._since > _PATIENCE
        if number == signal.SIGINT and again:
            raise KeyboardInterrupt
        if self.number is None:
            self.number, self._since = number, time.monotonic()

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; the same answer on all ranks."""
        return any_rank(self.number is not None)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as a shell reports it."""
        return 128 + (self.number or signal.SIGTERM)
