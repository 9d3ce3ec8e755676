"""Order, budget, admission and retraction; and the page allocator."""

import random
from typing import Any

import pytest
import torch

from configs.errors import UserError
from configs.model import AttentionConfig, ModelConfig, MoEConfig
from serve.cache.allocator import PageAllocator
from serve.cache.kv_cache import build_cache, bytes_per_token
from serve.cache.manager import PageManager
from serve.cache.radix import RadixCache
from serve.engine.core import EngineOptions
from serve.engine.request import Request, RequestError, SamplingParams
from serve.engine.scheduler import Scheduler

MODEL = ModelConfig(
    vocab_size=8,
    d_model=8,
    n_layers=1,
    attention=AttentionConfig(n_heads=1, n_kv_heads=1, head_dim=2),
    moe=MoEConfig(n_experts=1, top_k=1, d_expert=8),
)
CPU = torch.device("cpu")


def make(pages: int = 11, page_size: int = 4, running: int = 4, budget: int = 16) -> Scheduler:
    allocator = PageAllocator(pages)
    manager = PageManager(allocator, RadixCache(allocator, page_size), page_size, running, pages)
    return Scheduler(manager, max_running=running, max_batch_tokens=budget, max_waiting=4)


FRESH = iter(range(1, 1 << 30))


def request(length: int, max_tokens: int = 4, priority: int = 0, start: int = 0) -> Request:
    """A prompt of one token, different from all others unless `start` is given."""
    token = start or next(FRESH)
    return Request([token] * length, SamplingParams(max_tokens=max_tokens), None, priority)


def compute(scheduler: Scheduler) -> list[tuple[int, int, int]]:
    """Simulate the engine: every chunk is computed, every complete request gets a token."""
    batch = scheduler.next_batch()
    assert batch is not None
    for chunk in batch:
        scheduler.commit(chunk)
        if chunk.samples:
            chunk.request.num_pending -= 1
            chunk.request.tokens.append(1)
    return [(c.request.number, c.start, c.length) for c in batch]


def test_decodes_first_then_chunks_within_the_budget() -> None:
    scheduler = make(budget=8)
    scheduler.add([request(3), request(12), request(2)])
    assert compute(scheduler) == [(0, 0, 3), (1, 0, 5)]
    assert compute(scheduler) == [(0, 3, 1), (1, 5, 7)]
    assert compute(scheduler) == [(0, 4, 1), (1, 12, 1), (2, 0, 2)]
    scheduler.check()


def test_a_request_holds_pages_for_what_it_has() -> None:
    scheduler = make(pages=25, budget=64, running=8)
    scheduler.add([request(4, max_tokens=1000) for _ in range(8)])
    compute(scheduler)
    assert len(scheduler.running) == 8, "eight thousand tokens may come, a hundred fit"
    assert sum(len(one.sequence.pages) for one in scheduler.running) == 8
    scheduler.check()


def test_admission_leaves_room_to_grow() -> None:
    scheduler = make(pages=6, budget=32)  # five tokens of the budget are left
    scheduler.add([request(8), request(8), request(1)])
    compute(scheduler)
    assert [one.number for one in scheduler.running] == [0, 2], "the second would take the rest"


def test_the_last_in_rank_is_retracted_and_comes_back() -> None:
    scheduler = make(pages=9, budget=32)
    first, second = request(7, max_tokens=14), request(7, max_tokens=14)
    scheduler.add([first, second])
    while not scheduler.n_retracted:
        compute(scheduler)
        scheduler.check()
    assert (scheduler.running, scheduler.waiting) == ([first], [second])
    tokens = list(second.tokens)
    compute(scheduler)
    assert scheduler.waiting == [second], "there is no room for some time"
    scheduler.finish(first, "stop")
    compute(scheduler)
    assert second.running and second.tokens[: len(tokens)] == tokens
    assert second.num_retracted == 1


def test_priority_decides_who_goes_first_and_who_is_retracted() -> None:
    scheduler = make(running=1)
    low, high = request(4), request(4, priority=3)
    scheduler.add([low, high])
    compute(scheduler)
    assert scheduler.running == [high]
    scheduler = make(pages=9, budget=32)
    low, high = request(7, max_tokens=14), request(7, max_tokens=14, priority=1)
    scheduler.add([low])
    compute(scheduler)
    scheduler.add([high])
    while not scheduler.n_retracted:
        compute(scheduler)
    assert scheduler.waiting == [low]


def test_the_longest_cached_prefix_goes_first() -> None:
    scheduler = make(pages=40, running=1, budget=64)
    scheduler.add([request(16, max_tokens=1, start=7)])
    compute(scheduler)
    scheduler.finish(scheduler.running[0], "stop")
    cold, short, long = request(9), request(9, start=7), request(20, start=7)
    scheduler.add([cold, short, long])
    order = []
    while scheduler.busy:
        compute(scheduler)
        order.append(scheduler.running[0])
        scheduler.finish(order[-1], "stop")
    assert order == [long, short, cold]
    assert [one.num_cached for one in order] == [16, 8, 0]
    assert (scheduler.n_prompt_tokens, scheduler.n_cached_tokens) == (16 + 9 + 9 + 20, 24)


def test_one_too_large_for_now_lets_others_pass_but_not_for_ever() -> None:
    scheduler = make(pages=11, running=3, budget=64)
    scheduler.max_overtaken = 3
    steady, large = request(20, max_tokens=20), request(36)
    scheduler.add([steady, large])
    for _ in range(3):
        small = request(1, max_tokens=1)
        scheduler.add([small])
        compute(scheduler)
        assert small.running
        scheduler.finish(small, "stop")
    refused = request(1, max_tokens=1)
    scheduler.add([refused])
    compute(scheduler)
    assert large.aged and scheduler.running == [steady]
    scheduler.finish(steady, "stop")
    compute(scheduler)
    assert scheduler.running[0] is large


def test_finish_is_idempotent_and_works_anywhere() -> None:
    scheduler = make(running=1)
    first, second = request(4), request(4)
    scheduler.add([first, second])
    scheduler.next_batch()
    for one in (second, first, first, second):
        scheduler.finish(one, "cancelled")
        scheduler.check()
    assert not scheduler.busy
    assert scheduler.next_batch() == []


def test_full_queue_refuses_a_call_as_a_whole() -> None:
    scheduler = make(running=2)
    scheduler.add([request(1) for _ in range(5)])
    limit = scheduler.max_running + scheduler.max_waiting
    for n_new, n_coming in ((1, 0), (2, 0), (limit, 0), (limit, 3)):
        assert scheduler.n_excess(n_new, n_coming) == max(0, 5 + n_new + n_coming - limit)
    with pytest.raises(RequestError) as caught:
        scheduler.n_excess(limit + 1)
    assert caught.value.status == 400


@pytest.mark.parametrize("seed", range(8))
def test_random_lives(seed: int) -> None:
    """The request of highest rank advances at every step, and all requests end."""
    rng = random.Random(seed)
    scheduler = make(pages=rng.randint(8, 14), running=rng.randint(1, 6), budget=rng.randint(6, 20))
    todo = [
        request(rng.randint(1, 16), rng.randint(1, 12), rng.choice([0, 0, 2]), rng.randint(0, 3))
        for _ in range(25)
    ]
    for _ in range(2000):
        if todo and rng.random() < 0.4:
            scheduler.add([todo.pop()])
        first = scheduler.running[:1]
        batch = compute(scheduler)
        assert sum(length for _, _, length in batch) <= scheduler.max_batch_tokens
        assert {one.number for one in first} <= {number for number, _, _ in batch}
        for one in tuple(scheduler.running):
            done = one.n_output == one.params.max_tokens
            if done or rng.random() < 0.01:
                scheduler.finish(one, "length" if done else "cancelled")
        scheduler.check()
        if not todo and not scheduler.busy:
            return
    raise AssertionError("requests are still there")


@pytest.mark.parametrize("seed", range(4))
def test_allocator(seed: int) -> None:
    rng = random.Random(seed)
    allocator = PageAllocator(20)
    owned: list[list[int]] = []
    for _ in range(300):
        wanted = rng.randint(0, 6)
        before = allocator.n_free
        pages = allocator.allocate(wanted)
        assert (pages is None) == (wanted > before)
        owned += [] if pages is None else [pages]
        if owned and rng.random() < 0.5:
            allocator.release(owned.pop(rng.randrange(len(owned))))
        allocator.check(owned)
    with pytest.raises(AssertionError):
        allocator.check([*owned, [1]])


def test_cache_size() -> None:
    size = {"page_size": 4, "wanted": 100, "dtype": torch.float32, "device": CPU}
    assert bytes_per_token(MODEL, torch.bfloat16) == 8
    assert build_cache(MODEL, kv_tokens=0, **size).capacity == 100  # type: ignore[arg-type]
    cache = build_cache(MODEL, kv_tokens=9, **size)  # type: ignore[arg-type]
    assert cache.capacity == 12
    assert [t.shape for t in cache.tensors] == [(1, 4, 1, 2, 4), (1, 4, 1, 4, 2)]
    with pytest.raises(UserError, match="--kv-tokens 1099511627776: needs"):
        build_cache(MODEL, kv_tokens=1 << 40, **size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_running": 0}, "--max-running 0: must lie between"),
        ({"page_size": -1}, "--page-size -1: must lie between"),
        ({"kv_tokens": -5}, "--kv-tokens -5: must lie between"),
        ({"max_running": 64, "max_batch_tokens": 32}, "at least --max-running 64"),
        ({"page_size": 64, "kv_tokens": 48}, "--page-size 64: must not exceed --kv-tokens 48"),
        ({"page_size": 1.5}, "--page-size 1.5: must be an integer"),
        ({"cache": "lru"}, "--cache lru: must be radix or naive"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EngineOptions(**options)
