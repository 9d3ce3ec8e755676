"""Progress lines of a long task; a short task prints none."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

SECONDS = 5.0
"""Time between two lines."""
T = TypeVar("T")


def reported(
    items: Iterable[T], log: Callable[[str], None], line: Callable[[int], str]
) -> Iterator[T]:
    """The same items; every SECONDS `log` is called with `line` of the number of items so far."""
    last = time.monotonic()
    for count, item in enumerate(items):
        if time.monotonic() - last > SECONDS:
            last = time.monotonic()
            log(line(count))
        yield item
