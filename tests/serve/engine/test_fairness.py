"""A call with many choices does not keep other calls waiting. Steps are counted, not seconds."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from serve.engine.core import EngineCore
from serve.engine.request import Request
from tests.serve.drive import assert_no_page_lost, greedy, run


def steps_until_done(core: EngineCore, small: Request) -> int:
    steps = 0
    while small.finish_reason is None:
        core.step()
        core.scheduler.check()
        steps += 1
        assert steps < 5000
    return steps


@pytest.mark.parametrize(
    ("kv_tokens", "most", "overlap"),
    [
        (4096, 40, "off"), (224, 75, "on"),
        pytest.param(4096, 40, "on", marks=pytest.mark.slow),
        pytest.param(224, 75, "off", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_small_call_is_next(
    make_core: Callable[..., EngineCore], overlap: str, kv_tokens: int, most: int
) -> None:
    """Behind 8 calls with 16 choices of 60 tokens, which take 480 steps and more. With little
    memory each call has one running request, and the first of them to finish makes room."""
    core = make_core(max_running=16, overlap=overlap, kv_tokens=kv_tokens)
    calls = [core.make_requests([5 + i, 6], replace(greedy(60), n=16)) for i in range(8)]
    for call in calls:
        core.scheduler.add(call)
    for _ in range(5):
        core.step()
    (small,) = core.make_requests([77, 78], greedy(4))
    core.scheduler.add([small])
    assert steps_until_done(core, small) < most
    for call in calls:
        for request in call:
            core.scheduler.finish(request, "cancelled")
    while core.busy:
        core.step()
    assert_no_page_lost(core)


def test_calls_share_the_running_requests(make_core: Callable[..., EngineCore]) -> None:
    core = make_core(max_running=8)
    calls = [core.make_requests([5 + i, 6], replace(greedy(100), n=8)) for i in range(4)]
    for call in calls:
        core.scheduler.add(call)
    for _ in range(3):
        core.step()
    running = [sum(request.running for request in call) for call in calls]
    assert running == [2, 2, 2, 2]


def test_a_displaced_request_continues(make_core: Callable[..., EngineCore]) -> None:
    core = make_core(max_running=2)
    many = core.make_requests([5, 6], replace(greedy(30), n=2))
    core.scheduler.add(many)
    core.step()
    (small,) = core.make_requests([7, 8], greedy(20))
    core.scheduler.add([small])
    while core.busy:
        core.step()
        core.scheduler.check()
    assert max(request.num_retracted for request in many) >= 1
    alone = run(make_core(), make_core().make_requests([5, 6], greedy(30)))
    assert [request.output for request in many] == [alone[0].tokens] * 2
    assert [small.finish_reason, many[0].finish_reason] == ["length", "length"]


def test_higher_priority_is_not_displaced(make_core: Callable[..., EngineCore]) -> None:
    core = make_core(max_running=2)
    many = core.make_requests([5, 6], replace(greedy(30), n=2), priority=1)
    core.scheduler.add(many)
    core.step()
    (small,) = core.make_requests([7, 8], greedy(4))
    core.scheduler.add([small])
    while core.busy:
        core.step()
    assert [request.num_retracted for request in many] == [0, 0]
