"""The radix tree against a dictionary of prefixes, and the guarantees of locks and windows."""

import random
from collections.abc import Iterator, Sequence

import pytest

from serve.cache.allocator import NULL_PAGE, PageAllocator
from serve.cache.prefix_cache import NaiveCache, common_pages, token_key
from serve.cache.radix import Node, RadixCache

PAGE = 3
Prefix = tuple[int, ...]


def make(pages: int = 40, window: int = 0) -> RadixCache:
    return RadixCache(PageAllocator(pages + 1), PAGE, window)


def put(cache: RadixCache, tokens: Sequence[int]) -> list[int]:
    """Insert a prefix with fresh pages, as a finished request does."""
    key = token_key(tokens)
    shared, held = cache.acquire(key)
    own = cache.allocator.allocate(len(tokens) // PAGE - len(shared))
    assert own is not None
    pages, held = cache.insert(key, shared + own, held)
    cache.release(held)
    cache.check()
    return pages


def paths(cache: RadixCache) -> Iterator[tuple[bytes, list[int]]]:
    """Every prefix in the tree that ends at a node, with its pages."""
    stack: list[tuple[Node, bytes, list[int]]] = [(cache.root, b"", [])]
    while stack:
        node, key, pages = stack.pop()
        for child in node.children.values():
            stack.append((child, key + child.key, pages + child.pages))
            yield stack[-1][1:]


def test_longest_prefix_in_whole_pages() -> None:
    cache = make()
    pages = put(cache, range(9))
    assert cache.match(token_key(range(9))) == 3
    assert cache.match(token_key([*range(6), 9, 9, 9])) == 2
    assert cache.match(token_key([*range(5), 9])) == 1, "the second page differs in one token"
    assert cache.match(token_key([1, *range(8)])) == 0
    assert cache.acquire(token_key(range(6)))[0] == pages[:2]


def test_split_and_merge() -> None:
    cache = make()
    first = put(cache, [1] * 6 + [2] * 6)
    second = put(cache, [1] * 6 + [3] * 3)
    assert second[:2] == first[:2], "the common pages are stored once"
    assert len(list(cache.nodes())) == 3
    cache.acquire(token_key([1] * 6 + [2] * 6))
    assert cache.evict(10) == 1, "only the branch that nobody holds"
    assert len(list(cache.nodes())) == 1, "without a branch the two parts are one node again"
    cache.check()


def test_least_recently_used_first_and_from_the_end() -> None:
    cache = make()
    put(cache, [1] * 9)
    put(cache, [2] * 9)
    _, held = cache.acquire(token_key([1] * 9))
    cache.release(held)
    cache.evict(2)
    assert cache.match(token_key([2] * 9)) == 1
    cache.evict(2)
    assert cache.match(token_key([2] * 9)) == 0
    assert cache.match(token_key([1] * 9)) == 2
    cache.check()


def test_what_is_locked_stays() -> None:
    cache = make()
    put(cache, [1] * 12)
    pages, held = cache.acquire(token_key([1] * 6))
    assert (cache.n_evictable, cache.evict(100)) == (2, 2)
    assert cache.match(token_key([1] * 12)) == 2
    _, again = cache.acquire(token_key([1] * 3))
    cache.release(held)
    assert cache.evict(100) == 1
    with pytest.raises(AssertionError, match="running request"):
        cache.clear()
    cache.release(again)
    cache.clear()
    assert cache.allocator.n_free == 40
    assert cache.match(token_key([1] * 12)) == 0
    with pytest.raises(AssertionError, match="more often"):
        put(cache, [1] * 3)
        _, held = cache.acquire(token_key([1] * 3))
        cache.release(held)
        cache.release(held)
    assert pages


def test_the_cache_keeps_its_own_copy() -> None:
    """Two requests computed the same pages: the tree keeps the first one's and does not take the
    second one's."""
    cache = make()
    key = token_key([5] * 6)
    one, other = cache.allocator.allocate(2), cache.allocator.allocate(2)
    assert one is not None and other is not None
    assert cache.insert(key, one, cache.root)[0] == one
    kept, _ = cache.insert(key, other, cache.root)
    assert kept == one


def test_windows_reuse_up_to_a_border_with_a_whole_window_before_it() -> None:
    cache = make(window=5)  # the first new token attends to the four before it: two pages of three
    own = cache.allocator.allocate(6)
    assert own is not None
    cache.allocator.release([own[0], own[3]])
    pages = [NULL_PAGE, own[1], own[2], NULL_PAGE, own[4], own[5]]
    key = token_key(range(18))
    _, held = cache.insert(key, pages, cache.root)
    cache.release(held)
    cache.check()
    matches = [cache.match(key[: 4 * PAGE * n]) for n in range(7)]
    assert matches == [0, 0, 0, 3, 3, 3, 6]
    assert cache.acquire(key[: 4 * PAGE * 5])[0] == pages[:3]
    filled, _ = cache.insert(key[: 4 * PAGE], (own[0],), cache.root)
    assert filled == [own[0]], "a page that was missing is taken"
    assert cache.match(key[: 4 * PAGE]) == 1
    cache.check()


def test_short_prefix_within_the_window_needs_all_of_it() -> None:
    cache = make(window=100)
    own = cache.allocator.allocate(3)
    assert own is not None
    cache.insert(token_key(range(9)), [own[0], NULL_PAGE, own[2]], cache.root)
    assert cache.match(token_key(range(9))) == 1


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))]
)
def test_random_operations_against_a_dictionary(seed: int, window: int) -> None:
    """5,000 operations per seed on few distinct tokens, so that prefixes are shared, branch and are
    evicted."""
    rng = random.Random(seed)
    cache = make(pages=60, window=window)
    known: dict[Prefix, int] = {}
    """The expected page of every prefix of whole pages in the tree."""
    held: list[tuple[Prefix, list[int], Node]] = []

    def tokens() -> Prefix:
        base = rng.choice([*known, ()])
        more = rng.randrange(1, 5) * PAGE
        return base[: rng.randrange(0, len(base) + 1) // PAGE * PAGE] + tuple(
            rng.randrange(2) for _ in range(more)
        )

    def usable(prefix: Prefix) -> int:
        pages = [known.get(prefix[: n * PAGE], -1) for n in range(1, len(prefix) // PAGE + 1)]
        n_known = next((n for n, page in enumerate(pages) if page < 0), len(pages))
        needed = -(-(window - 1) // PAGE) if window else n_known
        fits = [n for n in range(1, n_known + 1) if NULL_PAGE not in pages[max(0, n - needed) : n]]
        return max(fits, default=0)

    def forget_missing() -> None:
        """Evicted prefixes were unlocked, and the remaining ones agree."""
        present: dict[Prefix, int] = {}
        for key, pages in paths(cache):
            ids = tuple(memoryview(key).cast("i"))
            present |= {ids[: n * PAGE]: page for n, page in enumerate(pages, 1)}
        for prefix, page in present.items():
            assert known[prefix] == page
        gone = known.keys() - present.keys()
        for prefix, pages, _ in held:
            assert not gone & {prefix[: n * PAGE] for n in range(1, len(pages) + 1)}
        for prefix in gone:
            del known[prefix]

    for _ in range(5000):
        prefix = tokens()
        action = rng.random()
        if action < 0.35:
            expected = usable(prefix)
            assert cache.match(token_key(prefix)) == expected
            pages, node = cache.acquire(token_key(prefix))
            assert pages == [known[prefix[: n * PAGE]] for n in range(1, expected + 1)]
            held.append((prefix[: expected * PAGE], pages, node))
        elif action < 0.6 and held:
            _, _, node = held.pop(rng.randrange(len(held)))
            cache.release(node)
        elif action < 0.9 and held:
            start, shared, node = held.pop(rng.randrange(len(held)))
            prefix = start + prefix
            n_new = len(prefix) // PAGE - len(shared)
            if n_new > cache.allocator.n_free:
                cache.evict(n_new - cache.allocator.n_free)
                forget_missing()
            own = cache.allocator.allocate(n_new)
            if own is None:
                cache.release(node)
                continue
            if window:  # some pages are before the window
                lost = own[: rng.randrange(len(own) + 1)]
                cache.allocator.release(lost)
                own = [NULL_PAGE] * len(lost) + own[len(lost) :]
            kept, node = cache.insert(token_key(prefix), shared + own, node)
            for n, (page, offered) in enumerate(zip(kept, shared + own, strict=True), 1):
                before = known.get(prefix[: n * PAGE], NULL_PAGE)
                assert page == (before or offered)
                known[prefix[: n * PAGE]] = page
                if offered not in (page, NULL_PAGE):
                    cache.allocator.release([offered])
            held.append((prefix, kept, node))
        elif action < 0.97:
            n, evictable = rng.randrange(1, 9), cache.n_evictable
            assert cache.evict(n) == min(n, evictable)
            forget_missing()
        elif not held or rng.random() < 0.1:
            for _, _, node in held:
                cache.release(node)
            held.clear()
            cache.clear()
            known.clear()
        cache.check()
        cache.allocator.check(cache.owned())
    for _, _, node in held:
        cache.release(node)
    assert cache.n_evictable == sum(page != NULL_PAGE for page in known.values())
    cache.evict(1000)
    assert cache.allocator.n_free == 60


def test_common_pages() -> None:
    rng = random.Random(0)
    for _ in range(500):
        one = [rng.randrange(2) for _ in range(rng.randrange(0, 8) * PAGE)]
        other = one[: rng.randrange(0, len(one) + 1)]
        other += [rng.randrange(2) for _ in range(rng.randrange(0, 8) * PAGE)]
        other = other[: len(other) // PAGE * PAGE]
        expected = 0
        while (expected + 1) * PAGE <= min(len(one), len(other)) and one[
            expected * PAGE : (expected + 1) * PAGE
        ] == other[expected * PAGE : (expected + 1) * PAGE]:
            expected += 1
        assert common_pages(token_key(one), token_key(other), 4 * PAGE) == expected


def test_naive_cache_keeps_nothing() -> None:
    cache = NaiveCache()
    key = token_key(range(6))
    assert cache.insert(key, [1, 2], None) == ([], None)
    assert (cache.match(key), cache.acquire(key), cache.evict(5)) == (0, ([], None), 0)
    assert list(cache.owned()) == []
