"""The interface of a prefix cache, and the cache that stores nothing.

A prefix is a whole number of pages. Its key is the token ids as bytes, four per token
(`token_key`): comparing and slicing them needs no Python code per token. `NaiveCache` is the
baseline of every measurement and the oracle of every test: with it each request computes all of its
tokens.
"""

from array import array
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

TOKEN_BYTES = 4
Handle = TypeVar("Handle")
"""The handle of a lock on a prefix; each cache defines its type."""


def token_key(tokens: Sequence[int]) -> bytes:
    """Token ids as native 32-bit integers."""
    return array("i", tokens).tobytes()


class PrefixCache(Protocol[Handle]):
    """Owns the pages of reusable prefixes."""

    root: Handle
    """The empty prefix; holding it locks nothing."""
    reuses: bool
    """Whether a prefix is ever reused."""
    version: int
    """Changes whenever the result of `match` may change."""

    @property
    def n_evictable(self) -> int:
        """Pages that `evict` could free now."""
        ...

    def match(self, key: bytes) -> int:
        """Pages of the longest prefix of `key` that can be reused. Changes nothing."""
        ...

    def acquire(self, key: bytes) -> tuple[list[int], Handle]:
        """The pages of that prefix, locked until `release`."""
        ...

    def insert(self, key: bytes, pages: Sequence[int], held: Handle) -> tuple[list[int], Handle]:
        """Offer the pages of `key`, of which the caller holds a prefix with `held`.

        Returns the pages that now belong to the cache, from the first one on, and their lock, which
        replaces `held`. If the cache already had a page, that one is returned and the offered one
        still belongs to the caller.
        """
        ...

    def release(self, held: Handle) -> None:
        """Release a lock; pages without a lock may be evicted."""
        ...

    def evict(self, n: int) -> int:
        """Free at least `n` pages, or all without a lock. Returns the number of freed pages."""
        ...

    def clear(self) -> None:
        """Remove all prefixes. Nothing may be locked."""
        ...

    def owned(self) -> Iterator[list[int]]:
        """All pages that belong to the cache."""
        ...

    def check(self) -> None:
        """Assert the invariants."""
        ...


class NaiveCache:
    """Stores nothing."""

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
