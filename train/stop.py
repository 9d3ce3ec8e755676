"""Stopping on Ctrl-C and SIGTERM without losing work.

The first signal only sets a flag. All ranks check it together before every microbatch, discard the
unfinished step and save; torchrun kills its workers 30 s after the signal, so stopping must not
wait for a long step. A later Ctrl-C interrupts at once.
"""

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
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

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
        """128 + the signal's number, as in a shell."""
        return 128 + (self.number or signal.SIGTERM)
