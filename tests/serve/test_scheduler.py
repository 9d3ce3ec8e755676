"""Order, budget, admission, preemption; and the allocator under them."""

import random

import pytest
import torch

from configs.errors import UserError
from configs.model import AttentionConfig, ModelConfig, MoEConfig
from serve.cache.kv_cache import KvCache, PageAllocator, build_cache, bytes_per_token
from serve.engine.engine import EngineOptions
from serve.engine.request import Request, RequestError, SamplingParams
from serve.engine.scheduler import Chunk, Scheduler

MODEL = ModelConfig(
    vocab_size=8,
    d_model=8,
    n_layers=1,
    attention=AttentionConfig(n_heads=1, n_kv_heads=1, head_dim=2),
    moe=MoEConfig(n_experts=1, top_k=1, d_expert=8),
)
CPU = torch.device("cpu")


def make(pages: int = 11, page_size: int = 4, running: int = 4, budget: int = 16) -> Scheduler:
    cache = KvCache(MODEL, pages, page_size, torch.float32, CPU)
    return Scheduler(cache, max_running=running, max_batch_tokens=budget, max_waiting=4)


def request(length: int, max_tokens: int = 4) -> Request:
    return Request([1] * length, SamplingParams(max_tokens=max_tokens), None)


def compute(batch: list[Chunk]) -> list[tuple[int, int, int]]:
    """Play the engine: every chunk is computed, every request that can gets a token."""
    shape = [(c.request.number, c.start, c.length) for c in batch]
    for chunk in batch:
        samples = chunk.samples
        chunk.request.computed = chunk.end
        if samples:
            chunk.request.tokens.append(1)
    return shape


def test_decodes_first_then_chunks_within_the_budget() -> None:
    scheduler = make(budget=8)
    scheduler.add([request(3), request(12), request(2)])
    assert compute(scheduler.next_batch()) == [(0, 0, 3), (1, 0, 5)]
    assert compute(scheduler.next_batch()) == [(0, 3, 1), (1, 5, 7)]
    assert compute(scheduler.next_batch()) == [(0, 4, 1), (1, 12, 1), (2, 0, 2)]
    assert compute(scheduler.next_batch()) == [(0, 5, 1), (1, 13, 1), (2, 2, 1)]
    scheduler.check()


def test_admission_leaves_a_page_of_growth_per_running_request() -> None:
    scheduler = make(pages=6, budget=32)  # five to give: 2 + 2 would leave 1, and two are running
    scheduler.add([request(8), request(8), request(1)])
    compute(scheduler.next_batch())
    assert [r.number for r in scheduler.running] == [0, 1]
    compute(scheduler.next_batch())
    scheduler.check()
    assert [r.number for r in scheduler.waiting] == [1, 2], "the youngest made room"
    assert scheduler.n_preempted == 1


def test_head_of_the_queue_is_not_overtaken() -> None:
    scheduler = make(pages=6)
    scheduler.add([request(12), request(16), request(1)])
    compute(scheduler.next_batch())
    assert [r.number for r in scheduler.running] == [0]
    scheduler.finish(scheduler.running[0], "stop")
    compute(scheduler.next_batch())
    assert [r.number for r in scheduler.running] == [1]


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
    scheduler.refuse_if_full(1)
    with pytest.raises(RequestError) as caught:
        scheduler.refuse_if_full(2)
    assert caught.value.status == 503


@pytest.mark.parametrize("seed", range(8))
def test_random_lives(seed: int) -> None:
    """The oldest running request moves at every step, and everything ends."""
    rng = random.Random(seed)
    scheduler = make(pages=rng.randint(8, 14), running=rng.randint(1, 6), budget=rng.randint(6, 20))
    todo = [request(rng.randint(1, 16), rng.randint(1, 12)) for _ in range(25)]
    for _ in range(2000):
        if todo and rng.random() < 0.4:
            scheduler.add([todo.pop()])
        batch = scheduler.next_batch()
        assert sum(chunk.length for chunk in batch) <= scheduler.max_batch_tokens
        assert not batch or scheduler.running[0] in [chunk.request for chunk in batch]
        compute(batch)
        for chunk in batch:
            done = chunk.request.n_output == chunk.request.params.max_tokens
            if done or rng.random() < 0.01:
                scheduler.finish(chunk.request, "length" if done else "cancelled")
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
    assert cache.pool.shape == (1, 2, 4, 4, 1, 2)
    with pytest.raises(UserError, match="--kv-tokens 1099511627776: needs"):
        build_cache(MODEL, kv_tokens=1 << 40, **size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_running": 0}, "--max-running 0: must lie between"),
        ({"page_size": -1}, "--page-size -1: must lie between"),
        ({"kv_tokens": -5}, "--kv-tokens -5: must lie between"),
        ({"max_running": 64, "max_batch_tokens": 32}, "at least --max-running 64"),
    ],
)
def test_impossible_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EngineOptions(**options)
