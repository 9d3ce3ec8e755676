"""Tests of the schedule tests: each of these faults is inserted into the code, and must be
detected."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from serve.cache.manager import PageManager
from serve.cache.radix import Node, RadixCache
from serve.engine.request import Request
from serve.engine.scheduler import Chunk, Scheduler
from tests.serve.engine.test_schedules import test_nobody_starves_behind_a_hot_prefix as starve
from tests.serve.hash_runner import make_core
from tests.serve.traffic import Workload, assert_as_alone, live


def _evict_what_is_locked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        RadixCache, "_is_candidate", lambda self, n: n.parent is not None and not n.children
    )


def _lock_only_the_last_node(patch: pytest.MonkeyPatch) -> None:
    lock, release = RadixCache._lock, RadixCache.release

    def lock_one(self: RadixCache, node: Node) -> None:
        parent, node.parent = node.parent, None
        lock(self, node)
        node.parent = parent

    def release_one(self: RadixCache, node: Node) -> None:
        parent, node.parent = node.parent, None
        release(self, node)
        node.parent = parent

    patch.setattr(RadixCache, "_lock", lock_one)
    patch.setattr(RadixCache, "release", release_one)


def _share_before_the_step(patch: pytest.MonkeyPatch) -> None:
    launch = Scheduler._launch

    def early(self: Scheduler, request: Request, length: int) -> Chunk:
        chunk = launch(self, request, length)
        self.pages.commit(request.sequence, request.tokens, min(chunk.end, len(request.tokens)))
        return chunk

    patch.setattr(Scheduler, "_launch", early)


def _match_a_page_too_many(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        "serve.cache.radix.common_pages", lambda one, other, size: min(len(one), len(other)) // size
    )


def _keep_copies(patch: pytest.MonkeyPatch) -> None:
    share = PageManager._share

    def leak(self: PageManager, *arguments: Any) -> None:
        with patch.context() as inner:
            inner.setattr(self.allocator, "release", lambda pages: None)
            share(self, *arguments)

    patch.setattr(PageManager, "_share", leak)


def _free_twice(patch: pytest.MonkeyPatch) -> None:
    release = PageManager.release

    def twice(self: PageManager, sequence: Any, *arguments: Any) -> None:
        own = sequence.pages[-1:]
        release(self, sequence, *arguments)
        self.allocator.release(own)

    patch.setattr(PageManager, "release", twice)


def _remember_what_was_retracted(patch: pytest.MonkeyPatch) -> None:
    retract = Scheduler._retract

    def keep(self: Scheduler, request: Request, keep: bool = True) -> None:
        before = request.num_computed
        retract(self, request, keep)
        request.num_computed = before

    patch.setattr(Scheduler, "_retract", keep)


def _draw_from_one_generator(patch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    patch.setattr("serve.engine.sampler._uniform", lambda seed, index: rng.random())


def _forget_the_age(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "_count_overtaken", lambda self, request: False)


def _hold_all_that_may_come(patch: pytest.MonkeyPatch) -> None:
    admit = PageManager.admit

    def greedy(self: PageManager, sequence: Any, key: bytes, n: int, spare: int) -> bool:
        return admit(self, sequence, key, n + 16, spare)

    patch.setattr(PageManager, "admit", greedy)


def _look_through_holes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RadixCache, "_usable", lambda self, pages: len(pages))


def _slide_too_far(patch: pytest.MonkeyPatch) -> None:
    slide = PageManager.slide
    patch.setattr(
        PageManager, "slide", lambda self, sequence, n: slide(self, sequence, n + self.page_size)
    )


def _score_only_what_is_not_cached(patch: pytest.MonkeyPatch) -> None:
    enqueue = Scheduler._enqueue

    def whole(self: Scheduler, request: Request) -> None:
        enqueue(self, request)
        request.key = self.pages.key_of(request.tokens, len(request.tokens) - 1)

    patch.setattr(Scheduler, "_enqueue", whole)


MUTATIONS: dict[Callable[[pytest.MonkeyPatch], None], int] = {
    _evict_what_is_locked: 0,
    _lock_only_the_last_node: 0,
    _share_before_the_step: 0,
    _match_a_page_too_many: 0,
    _keep_copies: 0,
    _free_twice: 0,
    _remember_what_was_retracted: 0,
    _draw_from_one_generator: 0,
    _hold_all_that_may_come: 0,
    _look_through_holes: 11,
    _slide_too_far: 11,
    _score_only_what_is_not_cached: 0,
}
"""Faults, each with the model's window for which it shows."""


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_these_tests_see_faults(mutate: Callable[[pytest.MonkeyPatch], None]) -> None:
    with pytest.raises((AssertionError, IndexError, KeyError)):
        with pytest.MonkeyPatch.context() as patch:
            mutate(patch)
            core = make_core(
                MUTATIONS[mutate], max_running=14, max_batch_tokens=60, page_size=4, kv_tokens=208
            )
            traffic = Workload(seed=5, n_requests=60)
            live(core, traffic)
        assert_as_alone(traffic, core.pages.window)


def test_the_unchanged_code_passes_what_sees_the_faults() -> None:
    for window in (0, 11):
        core = make_core(window, max_running=14, max_batch_tokens=60, page_size=4, kv_tokens=208)
        traffic = Workload(seed=5, n_requests=60)
        live(core, traffic)
        assert_as_alone(traffic, window)
        assert core.scheduler.n_retracted or window


def test_the_starvation_test_sees_a_scheduler_without_age(monkeypatch: pytest.MonkeyPatch) -> None:
    _forget_the_age(monkeypatch)
    with pytest.raises(AssertionError, match="starves"):
        starve()
