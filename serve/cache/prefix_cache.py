"""What the page manager asks of a cache of prefixes, and the cache that keeps nothing.

A prefix is a whole number of pages. Its key is the token ids as bytes, four per token
(`token_key`): comparing and slicing them costs no Python per token. `NaiveCache` is the baseline of
every measurement and the oracle of every test: with it each request computes all of its tokens.
"""

from array import array
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

TOKEN_BYTES = 4
Handle = TypeVar("Handle")
"""What holds a lock on a prefix; its type is the cache's affair."""


def token_key(tokens: Sequence[int]) -> bytes:
    """Token ids as native 32-bit integers."""
    return array("i", tokens).tobytes()


class PrefixCache(Protocol[Handle]):
    """Owns the pages of prefixes that may be used again."""

    root: Handle
    """The empty prefix; holding it locks nothing."""
    reuses: bool
    """Whether a prefix is ever found again."""
    version: int
    """Changes whenever `match` may answer differently."""

    @property
    def n_evictable(self) -> int:
        """Pages that `evict` could free now."""
        ...

    def match(self, key: bytes) -> int:
        """Pages of the longest prefix of `key` that can be reused. Changes nothing."""
        ...

    def acquire(self, key: bytes) -> tuple[list[int], Handle]:
        """That prefix's pages, locked until `release`."""
        ...

    def insert(self, key: bytes, pages: Sequence[int], held: Handle) -> tuple[list[int], Handle]:
        """Offer the pages of `key`, of which the caller holds a prefix with `held`.

        Returns the pages that now belong to the cache, from the first one on, and their lock, which
        takes the place of `held`. Where the cache had a page already, that one is returned and the
        offered one stays the caller's.
        """
        ...

    def release(self, held: Handle) -> None:
        """Give a lock back; what nobody holds may be evicted."""
        ...

    def evict(self, n: int) -> int:
        """Free at least `n` pages, or all that nobody holds. Returns how many."""
        ...

    def clear(self) -> None:
        """Forget everything. Nothing may be locked."""
        ...

    def owned(self) -> Iterator[list[int]]:
        """All pages that belong to the cache."""
        ...

    def check(self) -> None:
        """Assert the invariants."""
        ...


class NaiveCache:
    """Keeps nothing."""

    root = None
    reuses = False
    version = 0
    n_evictable = 0

    def match(self, key: bytes) -> int:
        return 0

    def acquire(self, key: bytes) -> tuple[list[int], None]:
        return [], None

    def insert(self, key: bytes, pages: Sequence[int], held: None) -> tuple[list[int], None]:
        return [], None

    def release(self, held: None) -> None:
        pass

    def evict(self, n: int) -> int:
        return 0

    def clear(self) -> None:
        pass

    def owned(self) -> Iterator[list[int]]:
        return iter(())

    def check(self) -> None:
        pass


def common_pages(one: bytes, other: bytes, page_bytes: int) -> int:
    """Leading pages in which two keys agree, by bisection over equal slices."""
    low, high = 0, min(len(one), len(other)) // page_bytes
    if one[: high * page_bytes] == other[: high * page_bytes]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        begin, end = low * page_bytes, middle * page_bytes
        if one[begin:end] == other[begin:end]:
            low = middle
        else:
            high = middle
    return low
