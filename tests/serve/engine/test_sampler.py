"""Sampled tokens follow the requested distribution, whatever else is in the batch."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from serve.cache.manager import SequencePages
from serve.engine.core import EngineCore
from serve.engine.logprobs import LEAST_LOGPROB, score
from serve.engine.request import Request, SamplingParams
from serve.engine.sampler import Sampler, threshold
from serve.engine.scheduler import Chunk
from tests.serve.drive import complete

CPU = torch.device("cpu")


def request(prompt: Sequence[int] = (1,), output: Sequence[int] = (), **params: Any) -> Request:
    made = Request(list(prompt), SamplingParams(max_tokens=50, **params), None)
    made.tokens += output
    return made


def random_logits(rows: int, vocab: int = 50, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def chunk_of(one: Request, index: int | None = None) -> Chunk:
    end = len(one.tokens)
    return Chunk(one, end - 1, 1, True, one.n_output if index is None else index)


def make_sampler(vocab: int, rows: int, ends: frozenset[int] = frozenset()) -> Sampler:
    return Sampler(vocab, ends, rows, CPU)


def choose(
    logits_RV: Tensor, requests: Sequence[Request], sampler: Sampler | None = None
) -> list[int | None]:
    """Sample one step; every request gets a row of the page table."""
    sampler = sampler or make_sampler(logits_RV.shape[1], len(requests))
    for row, one in enumerate(requests):
        one.sequence = SequencePages(row=row)
    plan = sampler.plan([chunk_of(one) for one in requests])
    found = sampler.sample(logits_RV.clone(), plan)
    tokens = zip(found.tokens_R.tolist(), found.best_R.isfinite().tolist(), strict=True)
    return [token if finite else None for token, finite in tokens]


def frequencies(logits_V: Tensor, draws: int = 20000, **params: Any) -> Tensor:
    """How often one seeded request draws each token, as its output grows."""
    one = request(seed=1, **params)
    sampler = make_sampler(len(logits_V), 1)
    plan = sampler.plan([chunk_of(one, index) for index in range(draws)])
    tokens = sampler.sample(logits_V.repeat(draws, 1), plan).tokens_R
    return torch.bincount(tokens, minlength=len(logits_V)) / draws


def test_greedy_is_argmax() -> None:
    logits = random_logits(9)
    requests = [request(temperature=0.0) for _ in range(9)]
    assert choose(logits, requests) == logits.argmax(-1).tolist()


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
    # top_p applies to the tokens that top_k kept: 0.4 of 0.7 is less than 0.6, 0.4 of 0.4 is all
    assert frequencies(logits, 500, top_k=2, top_p=0.6).nonzero().flatten().tolist() == [1, 3]
    assert frequencies(logits, 500, top_k=1, top_p=0.99).nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 9, "top_p": 0.8, "min_p": 0.02},
        {"repetition_penalty": 1.5, "frequency_penalty": 0.3, "presence_penalty": 0.2},
        {"logit_bias": {3: 5.0}, "min_tokens": 4, "stop_token_ids": (3,)},
        {"temperature": 1e-6},
    ],
)
def test_tokens_do_not_depend_on_the_batch(params: dict[str, Any]) -> None:
    rng = random.Random(0)
    steps = [random_logits(1, seed=s) for s in range(12)]
    alone = request(seed=7, **params)
    expected = []
    for logits in steps:
        expected += choose(logits, [alone])
        alone.tokens += expected[-1:]  # type: ignore[arg-type]
    crowd = request(seed=7, **params)
    found: list[int | None] = []
    for s, logits in enumerate(steps):
        others = [
            request(
                temperature=rng.choice([0.0, 0.5, 1.0]),
                top_k=rng.choice([0, 3, 40]),
                top_p=rng.choice([1, 0.5]),
                presence_penalty=rng.choice([0, 1.0]),
                prompt=[1, 2, 3],
                seed=s,
            )
            for _ in range(rng.randint(0, 5))
        ]
        at = rng.randint(0, len(others))
        noise = random_logits(len(others), seed=100 + s)
        batch = torch.cat([noise[:at], logits, noise[at:]])
        found.append(choose(batch, [*others[:at], crowd, *others[at:]])[at])
        crowd.tokens += found[-1:]  # type: ignore[arg-type]
    assert found == expected


def test_tiny_temperature_is_greedy() -> None:
    logits = random_logits(20)
    requests = [request(temperature=1e-6) for _ in range(20)]
    assert choose(logits, requests) == logits.argmax(-1).tolist()


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


def reference_logits(logits_V: Tensor, one: Request, ends: frozenset[int]) -> Tensor:
    """Bias, penalties and `min_tokens`, one token at a time in double precision."""
    p, logits = one.params, logits_V.double().tolist()
    for token, bias in p.logit_bias.items():
        logits[token] += bias
    for token in set(one.tokens):
        logits[token] *= p.repetition_penalty ** (-1 if logits[token] > 0 else 1)
    for token in one.output:
        logits[token] -= p.frequency_penalty
    for token in set(one.output):
        logits[token] -= p.presence_penalty
    if one.n_output < p.min_tokens:
        for token in ends | set(p.stop_token_ids):
            logits[token] = -math.inf
    return torch.tensor(logits)


@pytest.mark.parametrize("seed", range(5))
def test_adjusted_logits_against_a_loop(seed: int) -> None:
    rng = random.Random(seed)
    ends = frozenset([4, 5])
    requests = [
        request(
            prompt=[rng.randrange(50) for _ in range(rng.randint(1, 70))],
            output=[rng.randrange(50) for _ in range(rng.randint(0, 40))],
            repetition_penalty=rng.choice([1, 1.3, 0.8]),
            frequency_penalty=rng.choice([0, 0.7, -0.5]),
            presence_penalty=rng.choice([0, 1.1]),
            logit_bias=rng.choice([{}, {rng.randrange(50): 2.5, 7: -100}]),
            min_tokens=rng.choice([0, 20]),
            stop_token_ids=rng.choice([(), (9,)]),
        )
        for _ in range(12)
    ]
    sampler = make_sampler(50, 12, ends)
    for step in range(4):  # in later steps the history is on the device
        logits = random_logits(12, seed=seed * 10 + step)
        for row, one in enumerate(requests):
            one.sequence.row = row
        plan = sampler.plan([chunk_of(one) for one in requests])
        found = logits.clone()
        sampler._adjust(found, plan)
        for r, one in enumerate(requests):
            expected = reference_logits(logits[r], one, ends)
            assert torch.allclose(found[r], expected, atol=1e-5)
        sampled = sampler.sample(logits, plan)
        assert bool(plan.history_new) == (step == 0), "the host tells the history once"
        for one, token in zip(requests, sampled.tokens_R.tolist(), strict=True):
            one.tokens.append(token)


@pytest.mark.parametrize("vocab", [40, 3000])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_threshold_against_a_loop(vocab: int, scale: float) -> None:
    """Flat distributions need more candidates than are sorted at first."""
    rng = random.Random(0)
    probs = (random_logits(30, vocab) * scale).softmax(-1)
    top_k = [rng.choice([vocab, 1, 5, vocab // 2]) for _ in range(30)]
    top_p = [rng.choice([1.0, 0.01, 0.5, 0.95]) for _ in range(30)]
    min_p = [rng.choice([0.0, 0.05, 1.0]) for _ in range(30)]
    found = threshold(probs, *(torch.tensor(each) for each in (top_k, top_p, min_p)))
    for r in range(30):
        ordered = sorted(probs[r].tolist(), reverse=True)[: top_k[r]]
        total = sum(ordered) if top_k[r] < vocab else 1.0
        kept = [p for n, p in enumerate(ordered) if not n or sum(ordered[:n]) < top_p[r] * total]
        kept = [p for p in kept if p >= min_p[r] * ordered[0] - 1e-12]
        stay = probs[r] >= found[r]
        assert abs(int(stay.sum()) - len(kept)) <= (top_p[r] < 1), "one on the very border"
        assert stay[probs[r].argmax()]


def test_ties_stay_together() -> None:
    """Two tokens are tied for second place, so both are kept or neither."""
    probs = torch.tensor([[0.4, 0.2, 0.2, 0.15, 0.05]])
    for top_k, top_p in [(2, 1.0), (5, 0.5)]:
        least = threshold(probs, torch.tensor([top_k]), torch.tensor([top_p]), torch.zeros(1))
        assert (probs >= least[:, None]).tolist() == [[True, True, True, False, False]]


def test_padded_vocabulary_is_never_sampled() -> None:
    logits = random_logits(64, vocab=50)
    logits[:, 40:] += 50
    requests = [request(seed=s, temperature=s % 2, logprobs=20) for s in range(64)]
    sampler = make_sampler(40, 64)
    found = choose(logits, requests, sampler)
    assert all(token is not None and token < 40 for token in found)
    for row, one in enumerate(requests):
        one.sequence.row = row
    sampled = sampler.sample(logits, sampler.plan([chunk_of(one) for one in requests]))
    assert sampled.scores is not None and int(sampled.scores.top_ids.max()) < 40


def test_logprobs() -> None:
    logits = random_logits(3)
    found = score(logits, torch.tensor([4, 5, 6]), 20, 50).read([4, 5, 6], [0, 2, 20])
    for r, one in enumerate(found):
        expected = logits[r].log_softmax(-1)
        assert one.logprob == pytest.approx(expected[one.token].item(), abs=1e-6)
        assert len(one.top) == [0, 2, 20][r]
        assert all(v == pytest.approx(expected[t].item(), abs=1e-6) for t, v in one.top)
    assert found[2].top[0][0] == int(logits[2].argmax())
    assert math.exp(found[2].top[0][1]) <= 1
    impossible = torch.tensor([[0.0, -math.inf]])
    assert score(impossible, torch.tensor([1]), 0, 2).own_R.tolist() == [LEAST_LOGPROB]


def test_seeded_requests_through_the_engine(make_core: Callable[..., EngineCore]) -> None:
    """The same tokens alone, in a large batch, and after retraction."""
    mine = SamplingParams(max_tokens=20, seed=11, temperature=0.7, top_p=0.9, ignore_eos=True)
    expected = complete(make_core(), ["def add("], mine)[0].tokens
    crowd = [SamplingParams(max_tokens=20, seed=s, ignore_eos=True) for s in range(7)]
    core = make_core(kv_tokens=160, page_size=4)
    found = complete(core, ["print"] * 7 + ["def add("], [*crowd, mine])
    assert core.scheduler.n_retracted
    assert found[-1].tokens == expected
    assert len({tuple(one.tokens) for one in found}) == 8
