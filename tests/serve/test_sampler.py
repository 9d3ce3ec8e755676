"""Tokens follow the distribution that was asked for, whatever else is in the batch."""

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from serve.engine.engine import Engine
from serve.engine.request import Request, SamplingParams
from serve.engine.sampler import choose, score


def request(**params: object) -> Request:
    return Request([1], SamplingParams(**params), None)  # type: ignore[arg-type]


def random_logits(rows: int, vocab: int = 50, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def frequencies(logits_V: Tensor, draws: int = 20000, **params: object) -> Tensor:
    one = request(seed=1, **params)
    tokens = choose(logits_V.expand(draws, -1), [one] * draws)
    return torch.bincount(torch.tensor(tokens), minlength=len(logits_V)) / draws


def test_greedy_is_argmax() -> None:
    logits = random_logits(9)
    assert choose(logits, [request(temperature=0.0)] * 9) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_temperature(temperature: float) -> None:
    logits = random_logits(1, vocab=12)[0]
    expected = (logits / temperature).softmax(-1)
    assert (frequencies(logits, temperature=temperature) - expected).abs().max() < 0.02


def test_top_k_and_top_p_keep_the_likely_ones() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    found = frequencies(logits, top_k=2)
    assert found[[0, 2]].sum() == 0
    assert found[1] == pytest.approx(4 / 7, abs=0.02)
    for top_p, kept in [(0.39, [1]), (0.41, [1, 3]), (0.75, [1, 2, 3]), (0.95, [0, 1, 2, 3])]:
        assert frequencies(logits, 500, top_p=top_p).nonzero().flatten().tolist() == kept
    # top_p counts within what top_k left: 0.4 of 0.7 is less than 0.6, 0.4 of 0.4 is all
    assert frequencies(logits, 500, top_k=2, top_p=0.6).nonzero().flatten().tolist() == [1, 3]
    assert frequencies(logits, 500, top_k=1, top_p=0.99).nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("params", [{}, {"top_k": 7}, {"top_p": 0.8}, {"temperature": 1e-6}])
def test_tokens_do_not_depend_on_the_batch(params: dict[str, float]) -> None:
    rng = random.Random(0)
    steps = [random_logits(1, seed=s) for s in range(12)]
    alone = request(seed=7, **params)
    expected = [choose(logits, [alone])[0] for logits in steps]
    crowd = request(seed=7, **params)
    found = []
    for s, logits in enumerate(steps):
        others = [
            request(temperature=rng.choice([0.0, 0.5, 1.0]), top_k=rng.choice([0, 3]), seed=s)
            for _ in range(rng.randint(0, 5))
        ]
        at = rng.randint(0, len(others))
        noise = random_logits(len(others), seed=100 + s)
        batch = torch.cat([noise[:at], logits, noise[at:]])
        found.append(choose(batch, [*others[:at], crowd, *others[at:]])[at])
    assert found == expected


def test_tiny_temperature_is_greedy() -> None:
    logits = random_logits(20)
    assert choose(logits, [request(temperature=1e-6)] * 20) == logits.argmax(-1).tolist()


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((3000, 8), -torch.inf)
    logits[:, 2], logits[:, 5] = 0.0, -20.0
    assert set(choose(logits, [request(seed=s) for s in range(3000)])) <= {2, 5}


def test_not_finite_is_reported_for_its_row_alone() -> None:
    logits = random_logits(3)
    logits[1] = torch.nan
    params = [request(temperature=0.0), request(seed=1), request(temperature=0.0)]
    best = logits.argmax(-1).tolist()
    assert choose(logits, params) == [best[0], None, best[2]]


def test_logprobs() -> None:
    logits = random_logits(3)
    found = score(logits, [4, 5, 6], [0, 2, 5])
    for r, one in enumerate(found):
        expected = logits[r].log_softmax(-1)
        assert one.logprob == pytest.approx(expected[one.token].item(), abs=1e-6)
        assert len(one.top) == [0, 2, 5][r]
        assert all(v == pytest.approx(expected[t].item(), abs=1e-6) for t, v in one.top)
    assert found[2].top[0][0] == int(logits[2].argmax())
    assert math.exp(found[2].top[0][1]) <= 1


def test_seeded_requests_through_the_engine(make_engine: Callable[..., Engine]) -> None:
    """Alone, in a crowd, and preempted."""
    mine = SamplingParams(max_tokens=40, seed=11, temperature=0.7, top_p=0.9, ignore_eos=True)
    expected = make_engine().generate(["def add("], mine)[0].tokens
    crowd = [SamplingParams(max_tokens=40, seed=s, ignore_eos=True) for s in range(7)]
    engine = make_engine(kv_tokens=160, page_size=4)
    found = engine.generate(["print"] * 7 + ["def add("], [*crowd, mine])
    assert engine.scheduler.n_preempted
    assert found[-1].tokens == expected
    assert len({tuple(one.tokens) for one in found}) == 8
