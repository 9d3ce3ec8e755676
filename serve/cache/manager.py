"""The pages of every request: shared and own pages, and their page table.

A sequence's pages are in order of position. The first ones belong to the prefix cache and are
locked while the sequence runs; the others are its own, from the free list; if that is empty, the
cache evicts pages. A page is added to the cache only once it is full and the step that wrote it has
succeeded (`commit`, `release`), so no page is read before it is written.

Running sequences have a row of `page_table`, from which the batch of a step is cut.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from configs.model import ModelConfig
from serve.cache.allocator import NULL_PAGE, PageAllocator
from serve.cache.prefix_cache import PrefixCache, token_key


@dataclass(eq=False)
class SequencePages:
    """The manager's state of one sequence; empty while it waits."""

    pages: list[int] = field(default_factory=list)
    """Null pages replace those that left the window."""
    n_shared: int = 0
    """Leading pages that belong to the prefix cache."""
    handle: Any = None
    """Handle of the lock on them."""
    row: int = -1
    """Row of the page table."""


def freed_window(model: ModelConfig) -> int:
    """Number of tokens after which no layer attends to a token, so that its page can be freed. 0:
    none.

    All layers share the pages of a token, so one layer with full attention keeps all of them.
    """
    local = not any(model.attention.is_full(layer) for layer in range(model.n_layers))
    return model.attention.local_size if local else 0


class PageManager:
    """Pages of at most `max_sequences` running sequences of at most `max_pages` each.

    window: see `RadixCache`; if it is not 0, pages before the window are freed (`slide`).
    """

    def __init__(
        self,
        allocator: PageAllocator,
        prefixes: PrefixCache[Any],
        page_size: int,
        max_sequences: int,
        max_pages: int,
        window: int = 0,
    ) -> None:
        self.allocator = allocator
        self.prefixes = prefixes
        self.page_size = page_size
        self.window = window
        self.page_table = np.zeros((max_sequences, max_pages), dtype=np.int32)
        self._rows = list(range(max_sequences - 1, -1, -1))

    @property
    def n_available(self) -> int:
        """Pages that are free or evictable."""
        return self.allocator.n_free + self.prefixes.n_evictable

    def pages_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.page_size)

    def key_of(self, tokens: list[int], n_tokens: int) -> bytes:
        """The key of the whole pages among the first `n_tokens`."""
        return token_key(tokens[: n_tokens // self.page_size * self.page_size])

    def admit(self, sequence: SequencePages, key: bytes, n_tokens: int, spare: int) -> bool:
        """Lock the longest cached prefix of `key` and allocate the rest of `n_tokens`.

        Only if `spare` pages stay available afterwards; otherwise returns False without any change.
        """
        assert sequence.row < 0
        shared, handle = self.prefixes.acquire(key)
        wanted = self.pages_for(n_tokens) - len(shared)
        own = self._allocate(wanted) if wanted + spare <= self.n_available else None
        if own is None:
            self.prefixes.release(handle)
            return False
        sequence.pages, sequence.n_shared, sequence.handle = shared + own, len(shared), handle
        sequence.row = self._rows.pop()
        self.page_table[sequence.row, : len(sequence.pages)] = sequence.pages
        return True

    def grow(self, sequence: SequencePages, n_tokens: int) -> bool:
        """Allocate pages for `n_tokens` in total; returns False without any change if there are too
        few."""
        wanted = self.pages_for(n_tokens) - len(sequence.pages)
        if wanted <= 0:
            return True
        own = self._allocate(wanted)
        if own is None:
            return False
        begin = len(sequence.pages)
        sequence.pages += own
        self.page_table[sequence.row, begin : len(sequence.pages)] = own
        return True

    def commit(self, sequence: SequencePages, tokens: list[int], n_tokens: int) -> None:
        """Share the whole pages of the first `n_tokens`, which are all computed."""
        if not self.prefixes.reuses or self.window:
            return  # shared pages stay until the request ends, so with a window they are not shared
        self._share(sequence, tokens, n_tokens)
        self.page_table[sequence.row, : len(sequence.pages)] = sequence.pages

    def release(self, sequence: SequencePages, tokens: list[int], n_tokens: int) -> None:
        """Free all pages of a sequence; the first `n_tokens` are computed and may be shared."""
        if self.prefixes.reuses:
            self._share(sequence, tokens, n_tokens)
        own = sequence.pages[sequence.n_shared :]
        self.allocator.release([page for page in own if page != NULL_PAGE])
        self.prefixes.release(sequence.handle)
        self._rows.append(sequence.row)
        sequence.pages, sequence.n_shared, sequence.handle, sequence.row = [], 0, None, -1

    def slide(self, sequence: SequencePages, n_computed: int) -> None:
        """Free own pages to which no token from position `n_computed` on attends."""
        if not self.window:
            return
        behind = max(0, n_computed - self.window + 1) // self.page_size
        begin = sequence.n_shared
        while behind > begin and sequence.pages[behind - 1] != NULL_PAGE:
            behind -= 1
            self.allocator.release([sequence.pages[behind]])
            sequence.pages[behind] = NULL_PAGE
            self.page_table[sequence.row, behind] = NULL_PAGE

    def check(self, running: Iterable[SequencePages]) -> None:
        """Assert that no page is lost or has two owners, and that the page table is correct."""
        running = list(running)
        self.prefixes.check()
        own = [[page for page in one.pages[one.n_shared :] if page != NULL_PAGE] for one in running]
        self.allocator.check([*self.prefixes.owned(), *own])
        rows = [one.row for one in running] + self._rows
        assert sorted(rows) == list(range(len(self.page_table))), "a row leaked or has two owners"
        for one in running:
            assert self.page_table[one.row, : len(one.pages)].tolist() == one.pages

    def _allocate(self, n: int) -> list[int] | None:
        missing = n - self.allocator.n_free
        if missing > 0 and missing <= self.prefixes.n_evictable:
            self.prefixes.evict(missing)
        return self.allocator.allocate(n)

    def _share(self, sequence: SequencePages, tokens: list[int], n_tokens: int) -> None:
        """Offer whole pages to the prefix cache; if it has its own copy, use that one."""
        key = self.key_of(tokens, n_tokens)
        n_pages = n_tokens // self.page_size
        if n_pages <= sequence.n_shared:
            return
        offered = sequence.pages[:n_pages]
        kept, sequence.handle = self.prefixes.insert(key, offered, sequence.handle)
        own = zip(offered[sequence.n_shared :], kept[sequence.n_shared :], strict=True)
        self.allocator.release([mine for mine, its in own if mine != its and mine != NULL_PAGE])
        sequence.pages[:n_pages] = kept
        sequence.n_shared = n_pages
