"""Random traffic for an engine's core, and the expected output of each request."""

import random
from dataclasses import dataclass, field
from typing import Any

from serve.engine.core import EngineCore
from serve.engine.request import Request, SamplingParams
from tests.serve.drive import assert_no_page_lost
from tests.serve.hash_runner import VOCAB, make_core


@dataclass
class Call:
    """One prompt with its choices."""

    prompt: list[int]
    params: SamplingParams
    priority: int
    requests: list[Request] = field(default_factory=list)


def random_params(rng: random.Random) -> SamplingParams:
    more: dict[str, Any] = rng.choice(
        [
            {"temperature": 0.0},
            {"temperature": 0.8, "top_k": 5},
            {"top_p": 0.7},
            {"min_p": 0.2, "frequency_penalty": 0.5},
            {"repetition_penalty": 1.3, "presence_penalty": 0.4},
            {"logit_bias": {7: 3.0}, "stop_token_ids": (7,)},
            {"min_tokens": 3, "stop_token_ids": (1, 2, 3, 4, 5, 6)},
            {"logprobs": 2},
            {"prompt_logprobs": 1},
        ]
    )
    max_tokens = rng.randint(3, 20)
    n = rng.choice([1, 1, 1, 1, 2, 4])
    return SamplingParams(
        max_tokens=max_tokens, n=n, seed=rng.getrandbits(60), ignore_eos=rng.random() < 0.8, **more
    )


class Workload:
    """Calls with shared prefixes: a few system prompts, and turns that continue from answers."""

    def __init__(self, seed: int, n_requests: int) -> None:
        self.rng = random.Random(seed)
        self.left = n_requests
        self.systems = [self.tokens(self.rng.randint(5, 60)) for _ in range(4)]
        self.calls: list[Call] = []

    def tokens(self, n: int) -> list[int]:
        return [self.rng.randrange(1, VOCAB) for _ in range(n)]

    def next(self, core: EngineCore) -> Call:
        done = [r for call in self.calls for r in call.requests if r.finish_reason == "length"]
        base = self.rng.choice([[], *self.systems])
        if done and self.rng.random() < 0.4:
            base = self.rng.choice(done[-8:]).tokens[:150]
        prompt = base + self.tokens(self.rng.randint(1, 30))
        call = Call(prompt, random_params(self.rng), self.rng.choice([0, 0, 0, 1, 5]))
        call.requests = core.make_requests(call.prompt, call.params, call.priority)
        self.calls.append(call)
        self.left -= len(call.requests)
        return call


def live(core: EngineCore, traffic: Workload, aborts: float = 0.01) -> None:
    """Serve all traffic, with random arrivals and aborts."""
    rng = traffic.rng
    n_steps = 0
    while traffic.left > 0 or core.busy:
        while traffic.left > 0 and rng.random() < 0.25:
            core.scheduler.add(traffic.next(core).requests)
        core.step()
        if rng.random() < aborts:
            alive = [*core.scheduler.running, *core.scheduler.waiting]
            for victim in rng.sample(alive, min(len(alive), rng.randint(1, 3))):
                core.scheduler.finish(victim, "cancelled")
        core.scheduler.check()
        n_steps += 1
        assert n_steps < 20_000, "it never ends"
    assert_no_page_lost(core)


def assert_as_alone(traffic: Workload, window: int = 0) -> None:
    """Assert that every request has the output that it gets alone, without a prefix cache."""
    alone = make_core(window, cache="naive", max_running=1, kv_tokens=512)
    for call in traffic.calls:
        for index, request in enumerate(call.requests):
            (twin,) = alone.make_requests(call.prompt, call.params.choice(index))
            alone.scheduler.add([twin])
            while alone.busy:
                alone.step()
            n = len(request.output)
            assert request.output == twin.output[:n]
            if request.finish_reason != "cancelled":
                assert (request.finish_reason, n) == (twin.finish_reason, len(twin.output))
                assert request.prompt_logprobs == twin.prompt_logprobs
