"""Allocates the pages of the KV cache from a free list.

Page 0 is never allocated and stays zero: padding refers to it, so a batch of unequal lengths never
reads data of another request (`NULL_PAGE`).
"""

from collections.abc import Iterable, Sequence

NULL_PAGE = 0


class PageAllocator:
    """Allocates pages 1 to `n_pages - 1`, never the null page."""

    def __init__(self, n_pages: int) -> None:
        assert n_pages >= 2
        self.n_pages = n_pages
        self._free = list(range(n_pages - 1, 0, -1))

    @property
    def n_free(self) -> int:
        return len(self._free)

    def allocate(self, n: int) -> list[int] | None:
        """`n` pages, or None without any change if there are fewer."""
        if n > len(self._free):
            return None
        taken = self._free[len(self._free) - n :]
        del self._free[len(self._free) - n :]
        return taken

    def release(self, pages: Sequence[int]) -> None:
        self._free.extend(pages)

    def check(self, owned: Iterable[Sequence[int]]) -> None:
        """Assert that every page is either free or owned exactly once."""
        pages = self._free + [page for some in owned for page in some]
        assert sorted(pages) == list(range(1, self.n_pages)), "a page leaked or has two owners"
