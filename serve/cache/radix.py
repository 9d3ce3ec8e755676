"""Cache of computed prefixes for reuse (RadixAttention, arXiv:2312.07104).

A radix tree over token ids: a path from the root is a prefix, and a node stores the pages of its
part of it. Nodes are cut at page borders only, and a node's children are indexed by their first
page, so a step down the tree is one dictionary look-up and one comparison of bytes.

- **Lock.** A running request locks the path of its prefix; each node counts its locks. A node
  without a lock has no locked descendant, so it can always be evicted.
- **Evict.** Least recently used first, leaves only, and of a leaf only as many pages as are needed,
  from its end: the remaining part is still a prefix. Candidates are in a heap; outdated entries are
  detected by their time when they are popped.
- **Split and merge.** A node is split if a prefix ends inside it, and merged with an only child
  that has the same locks. In both, the lower node keeps its identity, because handles refer to it:
  a handle of the upper node would be one more lock of that node.
- **Windows.** A model whose layers all have a window frees pages before it, so a path may contain
  null pages. A prefix can then be reused up to a border only if all pages of the window before that
  border are present: the first new token attends to exactly these.

- **Events.** With `events`, nodes have the hashes of their pages, and every page that is added or
  evicted is reported; null pages are not stored.

Not thread-safe: only the engine's thread calls it.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence

from serve.cache.allocator import NULL_PAGE, PageAllocator
from serve.cache.kv_events import BlockEvents, block_hashes
from serve.cache.prefix_cache import TOKEN_BYTES, common_pages


class Node:
    """A part of a prefix, in whole pages."""

    __slots__ = ("children", "hashes", "key", "last_access", "locks", "pages", "parent")

    def __init__(self, parent: "Node | None", key: bytes, pages: list[int]) -> None:
        self.parent = parent
        self.key = key
        self.pages = pages
        self.hashes: list[int] = []
        """Of the pages, with those before them; empty without events."""
        self.children: dict[bytes, Node] = {}
        """Children by the key of their first page."""
        self.locks = 0
        self.last_access = 0


class RadixCache:
    """A `PrefixCache` whose pages come from and return to `allocator`.

    window: number of tokens to which a token attends (itself included) in every layer; 0 if a layer
    attends to all.
    """

    reuses = True

    def __init__(
        self,
        allocator: PageAllocator,
        page_size: int,
        window: int = 0,
        events: BlockEvents | None = None,
    ) -> None:
        self.events = events
        self.allocator = allocator
        self.page_size = page_size
        self.window = window
        self.page_bytes = page_size * TOKEN_BYTES
        self.root = Node(None, b"", [])
        self.version = 0
        self._n_evictable = 0
        self._clock = 0
        self._heap: list[tuple[int, int, Node]] = []
        self._n_pushed = 0

    @property
    def n_evictable(self) -> int:
        return self._n_evictable

    def match(self, key: bytes) -> int:
        pages: list[int] = []
        for node, n in self._walk(key):
            pages += node.pages[:n]
        return self._usable(pages)

    def acquire(self, key: bytes) -> tuple[list[int], Node]:
        pages: list[int] = []
        node = self._descend(key, self.match(key), pages)
        self._lock(node)
        return pages, node

    def insert(self, key: bytes, pages: Sequence[int], held: Node) -> tuple[list[int], Node]:
        assert len(key) == len(pages) * self.page_bytes
        known = sum(n for _, n in self._walk(key))
        kept: list[int] = []
        node = self._descend(key, known, kept, pages)
        if known < len(pages):
            child = Node(node, key[known * self.page_bytes :], list(pages[known:]))
            node.children[child.key[: self.page_bytes]] = child
            child.last_access = self._clock
            self._report_stored(child)
            kept += child.pages
            node = child
            self._n_evictable += _real(child.pages)
            self.version += 1
        self._lock(node)
        self.release(held)
        return kept, node

    def release(self, held: Node) -> None:
        node: Node | None = held
        while node is not None and node is not self.root:
            node.locks -= 1
            assert node.locks >= 0, "released more often than locked"
            if not node.locks:
                self._n_evictable += _real(node.pages)
            node = node.parent
        if not held.locks:
            self._push(held)
        self._merge(held)

    def evict(self, n: int) -> int:
        freed = 0
        while freed < n and self._heap:
            time, _, leaf = heapq.heappop(self._heap)
            if time == leaf.last_access and self._is_candidate(leaf):
                freed += self._shorten(leaf, n - freed)
        if freed:
            self.version += 1
        return freed

    def clear(self) -> None:
        assert not any(node.locks for node in self.nodes()), "a running request uses a prefix"
        for pages in self.owned():
            self.allocator.release(pages)
        self.root = Node(None, b"", [])
        self._heap = []
        self._n_evictable = 0
        self.version += 1
        if self.events is not None:
            self.events.cleared()

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            stack += node.children.values()
            yield node

    def owned(self) -> Iterator[list[int]]:
        return ([page for page in node.pages if page != NULL_PAGE] for node in self.nodes())

    def check(self) -> None:
        """Assert that keys, pages, locks and the count of evictable pages are consistent."""
        evictable = 0
        heaped = {id(node) for time, _, node in self._heap if time == node.last_access}
        for node in self.nodes():
            assert node.pages and len(node.key) == len(node.pages) * self.page_bytes
            assert node.parent is not None
            assert node.parent.children[node.key[: self.page_bytes]] is node
            if self.events is not None:
                assert node.hashes == block_hashes(_hash_before(node), node.key, self.page_bytes)
            assert node.locks >= sum(child.locks for child in node.children.values())
            assert self.window or NULL_PAGE not in node.pages
            evictable += 0 if node.locks else _real(node.pages)
            assert not self._is_candidate(node) or id(node) in heaped, "a leaf cannot be evicted"
        assert evictable == self._n_evictable

    def _walk(self, key: bytes) -> Iterator[tuple[Node, int]]:
        """The nodes along `key` and the number of pages of each that match it, at least one."""
        node, at, size = self.root, 0, self.page_bytes
        while (child := node.children.get(key[at : at + size])) is not None:
            n = common_pages(child.key, key[at : at + len(child.key)], size)
            yield child, n
            if n < len(child.pages):
                return
            node, at = child, at + len(child.key)

    def _descend(
        self, key: bytes, n_pages: int, pages: list[int], offered: Sequence[int] = ()
    ) -> Node:
        """The node at which the first `n_pages` of `key` end, split if necessary.

        Appends their pages to `pages`. Marks the path as used now, and replaces its null pages by
        those of `offered`.
        """
        self._clock += 1
        node, found = self.root, 0
        for child, n in tuple(self._walk(key)):
            if found == n_pages:
                break
            if n > n_pages - found or n < len(child.pages):
                child = self._split(child, min(n, n_pages - found))
            self._adopt(child, offered[found : found + len(child.pages)])
            child.last_access = self._clock
            pages += child.pages
            found += len(child.pages)
            node = child
        assert found == n_pages
        if self._is_candidate(node):
            self._push(node)
        return node

    def _usable(self, pages: list[int]) -> int:
        """Number of these leading pages that can be reused: the window before the border is
        complete."""
        if not self.window:
            return len(pages)
        needed = -(-(self.window - 1) // self.page_size)
        whole = usable = 0
        for n, page in enumerate(pages, 1):
            whole = whole + 1 if page != NULL_PAGE else 0
            if whole >= min(n, needed):
                usable = n
        return usable

    def _adopt(self, node: Node, offered: Sequence[int]) -> None:
        for i, page in enumerate(offered):
            if node.pages[i] == NULL_PAGE != page:
                node.pages[i] = page
                self._n_evictable += not node.locks
                self.version += 1
                if self.events is not None:
                    before = node.hashes[i - 1] if i else _hash_before(node)
                    self.events.stored(before, node.hashes[i : i + 1], self._part(node, i, i + 1))

    def _lock(self, node: Node | None) -> None:
        while node is not None and node is not self.root:
            if not node.locks:
                self._n_evictable -= _real(node.pages)
            node.locks += 1
            node = node.parent

    def _split(self, node: Node, n_pages: int) -> Node:
        """Create a new node of the first `n_pages` of `node`, above it."""
        parent, cut = node.parent, n_pages * self.page_bytes
        assert parent is not None and 0 < n_pages < len(node.pages)
        upper = Node(parent, node.key[:cut], node.pages[:n_pages])
        upper.locks, upper.last_access = node.locks, node.last_access
        upper.hashes, node.hashes = node.hashes[:n_pages], node.hashes[n_pages:]
        parent.children[upper.key[: self.page_bytes]] = upper
        node.parent, node.key, node.pages = upper, node.key[cut:], node.pages[n_pages:]
        upper.children[node.key[: self.page_bytes]] = node
        return upper

    def _merge(self, node: Node) -> None:
        """Merge `node` into its only child if both have the same locks."""
        parent = node.parent
        if parent is None or len(node.children) != 1:
            return
        (child,) = node.children.values()
        if child.locks != node.locks:
            return
        child.key, child.pages = node.key + child.key, node.pages + child.pages
        child.hashes = node.hashes + child.hashes
        child.parent = parent
        parent.children[child.key[: self.page_bytes]] = child
        node.parent, node.children = None, {}
        if node.last_access > child.last_access:
            child.last_access = node.last_access
            self._push(child)

    def _shorten(self, leaf: Node, n: int) -> int:
        """Free `n` pages from the end of a leaf, or the whole leaf."""
        keep = len(leaf.pages)
        freed: list[int] = []
        while keep and len(freed) < n:
            keep -= 1
            if leaf.pages[keep] != NULL_PAGE:
                freed.append(leaf.pages[keep])
        if self.events is not None:
            gone = zip(leaf.pages[keep:], leaf.hashes[keep:], strict=True)
            self.events.removed([block for page, block in gone if page != NULL_PAGE])
            leaf.hashes = leaf.hashes[:keep]
        self.allocator.release(freed)
        self._n_evictable -= len(freed)
        parent = leaf.parent
        assert parent is not None
        if keep:
            leaf.key, leaf.pages = leaf.key[: keep * self.page_bytes], leaf.pages[:keep]
            self._push(leaf)
            return len(freed)
        del parent.children[leaf.key[: self.page_bytes]]
        leaf.parent = None
        if self._is_candidate(parent):
            self._push(parent)
        self._merge(parent)
        return len(freed)

    def _report_stored(self, node: Node) -> None:
        """Report the pages of a new node, in runs between null pages."""
        if self.events is None:
            return
        before = _hash_before(node)
        node.hashes = block_hashes(before, node.key, self.page_bytes)
        at = 0
        for is_null, run in itertools.groupby(node.pages, NULL_PAGE.__eq__):
            end = at + len(tuple(run))
            if not is_null:
                before = node.hashes[at - 1] if at else before
                self.events.stored(before, node.hashes[at:end], self._part(node, at, end))
            at = end

    def _part(self, node: Node, begin: int, end: int) -> bytes:
        return node.key[begin * self.page_bytes : end * self.page_bytes]

    def _is_candidate(self, node: Node) -> bool:
        return node.parent is not None and not node.children and not node.locks

    def _push(self, node: Node) -> None:
        if not self._is_candidate(node):
            return
        if len(self._heap) > 64 and len(self._heap) > 4 * self.allocator.n_pages:
            self._heap = [e for e in self._heap if e[0] == e[2].last_access]
            self._heap = [e for e in self._heap if self._is_candidate(e[2])]
            heapq.heapify(self._heap)
        self._n_pushed += 1
        heapq.heappush(self._heap, (node.last_access, self._n_pushed, node))


def _hash_before(node: Node) -> int | None:
    """The hash of the page before a node's first one; None if that is the first of a prefix."""
    return node.parent.hashes[-1] if node.parent is not None and node.parent.hashes else None


def _real(pages: Sequence[int]) -> int:
    return len(pages) - pages.count(NULL_PAGE)
