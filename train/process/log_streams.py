"""Standard streams whose log file may be on a full disk, without an error in the training."""

import io
import os
import sys
from contextlib import suppress

from configs.health.heartbeat import SUPERVISOR_VARIABLE


class LogStream(io.TextIOWrapper):
    """Text that is lost if it cannot be written."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def use_log_streams() -> None:
    """Replace the streams of a rank that a supervisor started: it logs them next to the
    checkpoints. A terminal is kept as it is."""
    if SUPERVISOR_VARIABLE not in os.environ:
        return
    for name, number in (("stdout", 1), ("stderr", 2)):
        if not os.isatty(number):
            raw = open(number, "wb", closefd=False)
            stream = LogStream(
                raw, encoding="utf-8", errors="backslashreplace", line_buffering=name == "stderr"
            )
            setattr(sys, name, stream)
