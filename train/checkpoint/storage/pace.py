"""How fast a thread in the background may work, so that it does not slow others."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

SHARE = 0.025
"""Share of the time that the thread computes where it has to wait for a core."""
_CONTENDED = 0.05
"""Waiting for a core, relative to computing, from which on there is no idle core."""
_MEMORY = 0.9
"""Weight of the earlier pieces of work against that of the newest."""


def thread_times() -> tuple[float, float]:
    """Seconds that this thread has computed, and has waited for a core; zeros if the system does
    not report them."""
    with suppress(OSError, ValueError):
        computed, waited, _ = Path("/proc/thread-self/schedstat").read_text().split()
        return int(computed) / 1e9, int(waited) / 1e9
    return 0.0, 0.0


class Pace:
    """Pauses between pieces of work.

    While a core is idle there are none. A thread that had to wait for a core shares it with one
    that trains: each switch costs that one some caches, in a step that all ranks wait for, even if
    the thread has the lowest priority. So its work is distributed over many steps.
    """

    def __init__(self, times: Callable[[], tuple[float, float]] = thread_times) -> None:
        """times: seconds of computing and waiting for a core so far."""
        self._times = times
        self._last = times()
        self._computed = self._waited = 0.0

    def pause(self) -> float:
        """Seconds to sleep after a piece of work."""
        now = self._times()
        computed, waited = (end - begin for end, begin in zip(now, self._last, strict=True))
        self._last = now
        self._computed = _MEMORY * self._computed + computed
        self._waited = _MEMORY * self._waited + waited
        if self._waited <= _CONTENDED * self._computed:
            return 0.0
        return computed * (1 / SHARE - 1)
