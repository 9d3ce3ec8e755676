"""Lines that say how far a long piece of work is, without a line where it is short."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

SECONDS = 5.0
"""Between two lines."""
T = TypeVar("T")


def reported(
    items: Iterable[T], log: Callable[[str], None], line: Callable[[int], str]
) -> Iterator[T]:
    """The same items; every SECONDS `log` gets `line` of the number that were taken so far."""
    last = time.monotonic()
    for count, item in enumerate(items):
        if time.monotonic() - last > SECONDS:
            last = time.monotonic()
            log(line(count))
        yield item
