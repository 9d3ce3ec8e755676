"""Runs an engine's core step by step, checking its invariants after every step."""

import time
from collections.abc import Sequence
from typing import Any

from serve.engine.core import EngineCore
from serve.engine.request import Output, Request, SamplingParams, start_grammars
from serve.frontend.engine import Completion


def greedy(n: int, **more: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": n, "temperature": 0.0, "ignore_eos": True, **more})


def make_request(core: EngineCore, prompt: str | Sequence[int], params: SamplingParams) -> Request:
    tokens = core.encode(prompt) if isinstance(prompt, str) else prompt
    (request,) = core.make_requests(tokens, params)
    return request


def run(core: EngineCore, requests: Sequence[Request]) -> list[Completion]:
    """Serve `requests`, added at the same time."""
    start_grammars(requests)
    found = {request: Completion(request.prompt, request=request) for request in requests}
    core.scheduler.add(requests)
    while core.busy:
        for output in core.step():
            found[output.request].add(output)
        core.scheduler.check()
    assert_no_page_lost(core)
    return list(found.values())


def complete(
    core: EngineCore,
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
) -> list[Completion]:
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    return run(core, [make_request(core, *one) for one in zip(prompts, each, strict=True)])


def assert_no_page_lost(core: EngineCore) -> None:
    """With nothing running, all pages are free or can be evicted, and evicting frees them."""
    total = core.allocator.n_pages - 1
    assert core.allocator.n_free + core.pages.prefixes.n_evictable == total
    core.scheduler.check()


def slow_down(core: EngineCore, seconds: float) -> None:
    """Each step takes at least this long."""
    step = core.step

    def slow() -> list[Output]:
        time.sleep(seconds)
        return step()

    core.step = slow  # type: ignore[method-assign]
