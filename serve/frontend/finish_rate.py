"""The rate at which requests end, for clients that are refused and may come back later."""

import math
import time
from collections import deque
from collections.abc import Callable

MAX_RETRY_S = 60
_MOST_ENDS = 64
"""Number of ends that the rate is measured over."""


class FinishRate:
    """Measures while there is work; idle time does not count. Times are seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: deque[float] = deque([clock()], _MOST_ENDS + 1)
        """When the measurement began or an early request ended, then when later ones ended."""

    def begin(self) -> None:
        """There is work again: discard what was measured before."""
        self._times.clear()
        self._times.append(self._clock())

    def count(self) -> None:
        """A request ended."""
        self._times.append(self._clock())

    def seconds(self, n_requests: int) -> float:
        """The time in which so many requests will end at this rate. If none has ended yet: as long
        as none has."""
        elapsed, n_ended = self._clock() - self._times[0], len(self._times) - 1
        return elapsed * n_requests / n_ended if n_ended else elapsed

    def retry_after(self, n_excess: int, n_waiting: int) -> int:
        """Whole seconds, from 1 to `MAX_RETRY_S`, after which a refused call should come back: when
        there is room for it, and half of the queue has ended, so that the queue never runs dry.

        Args:
            n_excess: Requests that must end before the refused ones fit.
            n_waiting: Requests that wait.
        """
        seconds = math.ceil(self.seconds(max(n_excess, n_waiting // 2)))
        return min(max(seconds, 1), MAX_RETRY_S)
