"""Stopping on Ctrl-C, SIGTERM and SIGUSR1 without losing work.

Cluster schedulers send SIGTERM (SLURM: a pre-emption) or the signal that a job selects (SIGUSR1 in
our job scripts, before the end of its time).

Before there is anything to save, a signal ends the process: while it starts, loads, and in its
first step, which may compile for minutes. After `save_first`, which the trainer calls when the
gradients of that step are there, it only sets a flag: all ranks check it together before every
microbatch, discard the unfinished step and save; torchrun kills its workers 30 s after the signal,
so stopping must not wait for a long step. A second signal ends the process at once. A thread
receives the signals, because the main thread runs no handler while it waits in a collective.
"""

import os
import signal
import threading
import time
from typing import Any

_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_PATIENCE = 2.0
"""Seconds within which a second signal is treated as the launcher forwarding the first."""


class StopSignal:
    """Records that this process received a signal to stop; a context manager, for the main
    thread."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.has_step = False
        """Whether this attempt has completed a step."""
        self._since, self._saves = 0.0, False

    def __enter__(self) -> "StopSignal":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # the interpreter writes the number of every signal that has a handler
        self._other = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._handlers: dict[int, Any] = {
            number: signal.signal(number, lambda *_: None) for number in _STOPS
        }
        self._thread = threading.Thread(target=self._receive, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._other)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def save_first(self) -> None:
        """From now on a first signal only sets `number`. To be called before a collective without
        which no rank completes its first step: then no rank ends at once after another has one."""
        self._saves = True

    def step_is_complete(self) -> None:
        """Note that there is something to lose."""
        self.has_step = True

    @property
    def exit_code(self) -> int:
        """75 (EX_TEMPFAIL) after SIGTERM or SIGUSR1: the state is saved, and a supervisor should
        start the same command again. 130 after Ctrl-C, as in a shell."""
        return 128 + signal.SIGINT if self.number == signal.SIGINT else os.EX_TEMPFAIL

    def _receive(self) -> None:
        while number := os.read(self._read, 1):
            if number[0] not in _STOPS:
                continue
            again = self.number is not None and time.monotonic() - self._since > _PATIENCE
            if self.number is None:
                self.number, self._since = number[0], time.monotonic()
            if again or not self._saves:
                os._exit(self.exit_code)


def ignore_stop_signals() -> None:
    """Let signals to stop do nothing: the run is over, and Python takes time to end."""
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
