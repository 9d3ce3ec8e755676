"""Random schedules of many requests: each gets the same output as alone without a prefix cache.

The model is a hash of the cache's content (`tests.serve.hash_runner`), and the invariants of
scheduler, pool and tree are asserted after every step.
"""

import random

import pytest

from serve.engine.request import Request, SamplingParams
from tests.serve.hash_runner import VOCAB, make_core
from tests.serve.traffic import Call, Workload, assert_as_alone, live


@pytest.mark.long
@pytest.mark.parametrize(
    ("n", "cache", "window", "overlap"),
    [
        (80, "radix", 11, "on"),
        *(
            pytest.param(500, *options, marks=pytest.mark.slow)
            for options in (
                ("radix", 11, "on"), ("radix", 0, "off"), ("radix", 0, "on"), ("naive", 0, "off"),
            )
        ),
    ],
)  # fmt: skip
def test_many_requests(n: int, cache: str, window: int, overlap: str) -> None:
    core = make_core(
        window,
        cache=cache,
        overlap=overlap,
        max_running=7,
        max_batch_tokens=40,
        page_size=4,
        kv_tokens=600,
    )
    traffic = Workload(seed=5, n_requests=n)
    live(core, traffic, aborts=0.03)
    core.close()
    assert_as_alone(traffic, window)
    hits = core.scheduler.n_cached_tokens / core.scheduler.n_prompt_tokens
    assert hits > 0.2 if cache == "radix" else hits == 0
    assert {r.finish_reason for c in traffic.calls for r in c.requests} == {
        "length", "stop", "cancelled"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("seed", "overlap"),
    [
        pytest.param(
            seed, overlap,
            marks=[] if (seed, overlap) in ((0, "off"), (1, "on"), (3, "on")) else pytest.mark.slow,
        )
        for seed in range(4)
        for overlap in ("off", "on")
    ],
)  # fmt: skip
def test_random_sizes(seed: int, overlap: str) -> None:
    rng = random.Random(seed)
    core = make_core(
        rng.choice([0, 0, 6]),
        overlap=overlap,
        max_running=rng.randint(1, 9),
        max_batch_tokens=rng.randint(9, 60),
        page_size=rng.choice([1, 2, 5, 16]),
        kv_tokens=rng.randint(200, 320),
    )
    traffic = Workload(seed, n_requests=40)
    live(core, traffic, aborts=0.05)
    core.close()
    assert_as_alone(traffic, core.pages.window)


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_retraction_happens_and_changes_nothing(overlap: str) -> None:
    """The working set is three times the pool."""
    core = make_core(overlap=overlap, max_running=12, page_size=4, kv_tokens=220)
    rng = random.Random(0)
    prompt = [rng.randrange(1, VOCAB) for _ in range(25)]
    traffic = Workload(seed=0, n_requests=0)
    for index in range(14):
        params = SamplingParams(max_tokens=40, seed=index, ignore_eos=True)
        call = Call([*prompt[: index % 3 * 8], *traffic.tokens(15)], params, 0)
        call.requests = core.make_requests(call.prompt, params)
        traffic.calls.append(call)
        core.scheduler.add(call.requests)
    live(core, traffic, aborts=0)
    core.close()
    assert core.scheduler.n_retracted > 0
    computed = sum(len(r.tokens) for c in traffic.calls for r in c.requests)
    assert computed > 3 * core.cache.capacity
    assert_as_alone(traffic)


def test_retracted_requests_do_not_thrash() -> None:
    """The naive cache loses retracted tokens; even so, few tokens are computed twice."""
    core = make_core(cache="naive", max_running=16, page_size=4, kv_tokens=400)
    traffic = Workload(seed=1, n_requests=0)
    for _ in range(40):
        params = SamplingParams(max_tokens=80, temperature=0, ignore_eos=True)
        call = Call(traffic.tokens(8), params, 0)
        call.requests = core.make_requests(call.prompt, params)
        traffic.calls.append(call)
        core.scheduler.add(call.requests)
    live(core, traffic, aborts=0)
    requests = [request for call in traffic.calls for request in call.requests]
    assert 0 < core.scheduler.n_retracted < 40
    assert max(request.num_retracted for request in requests) <= 3
    needed = sum(len(request.tokens) - 1 for request in requests)
    assert core.executor.runner.n_rows < 1.5 * needed  # type: ignore[attr-defined]


def test_nobody_starves_behind_a_hot_prefix() -> None:
    core = make_core(max_running=2, page_size=4, kv_tokens=400)
    hot = [5] * 40

    def add(prompt: list[int]) -> Request:
        params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
        (request,) = core.make_requests(prompt, params)
        core.scheduler.add([request])
        return request

    add(hot)
    while core.busy:
        core.step()
    for _ in range(3):
        add([*hot, 9])
    cold = add([8] * 20)
    later: list[Request] = []
    while not cold.running:
        later.append(add([*hot, len(later) % VOCAB]))
        core.step()
        core.scheduler.check()  # asserts the bound
        assert len(later) < 500, "the cold request starves"
    assert cold.num_overtaken == core.scheduler.max_overtaken
    assert sum(one.finish_reason is not None for one in later) > 40, "the hot ones came first"


def test_siblings_share_the_prompt() -> None:
    """n = 4: the prompt is computed once, except for its last page."""
    core = make_core(page_size=4)
    requests = core.make_requests([3] * 41, SamplingParams(n=4, max_tokens=2, ignore_eos=True))
    core.scheduler.add(requests)
    while core.busy:
        core.step()
    assert [request.num_cached for request in requests] == [0, 40, 40, 40]
    assert core.executor.runner.n_rows == 41 + 3 + 4  # type: ignore[attr-defined]


def test_turns_of_a_conversation_reuse_prompt_and_answer() -> None:
    core = make_core(page_size=4)
    tokens = [3] * 10
    for turn in range(4):
        (request,) = core.make_requests(tokens, SamplingParams(max_tokens=9, ignore_eos=True))
        core.scheduler.add([request])
        while core.busy:
            core.step()
        expected = (
            (len(tokens) - 3) // 4 * 4 if turn else 0
        )  # the last answer's end is not computed
        assert request.num_cached == expected
        tokens = [*request.tokens, 7, 8]


def test_nothing_computed_before_is_used_after_a_flush() -> None:
    core = make_core(page_size=4, max_running=3)
    traffic = Workload(seed=3, n_requests=30)
    while traffic.left > 0:
        core.scheduler.add(traffic.next(core).requests)
    for _ in range(15):
        core.step()
    assert core.scheduler.running and core.pages.prefixes.n_evictable
    core.flush_cache()
    assert core.allocator.n_free == core.allocator.n_pages - 1
    core.executor.runner.positions[:] = -1  # type: ignore[attr-defined]
    live(core, traffic, aborts=0)
    assert_as_alone(traffic)
