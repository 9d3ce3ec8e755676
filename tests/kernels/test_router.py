"""The router's operation on the CPU against plain loops over tokens. Weights are fp32 sums of a few
terms, so they agree within a relative 1e-6."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.moe import router
from kernels.moe.router import RouterOptions, route

RULES = [
    RouterOptions(2, True),
    RouterOptions(1, False, normalize=False, scale=2.5),
    RouterOptions(4, False, n_groups=4, top_groups=2, scale=2.5),
    RouterOptions(3, True, n_groups=3, top_groups=2, normalize=False),
]


def loop(
    logits: list[float], bias: list[float], rule: RouterOptions
) -> tuple[list[int], list[float]]:
    """Ids and weights of one token, from the definition, in fp64."""
    n = len(logits)
    if rule.softmax:
        powers = [math.exp(x - max(logits)) for x in logits]
        score = [p / sum(powers) for p in powers]
    else:
        score = [1 / (1 + math.exp(-x)) for x in logits]
    value = [s + b for s, b in zip(score, bias, strict=True)]
    size = n // rule.n_groups
    groups = [range(g * size, (g + 1) * size) for g in range(rule.n_groups)]
    best = [sum(sorted((value[e] for e in g), reverse=True)[: 2 - rule.softmax]) for g in groups]
    kept = sorted(range(rule.n_groups), key=lambda g: (-best[g], g))[: rule.top_groups]
    within = [e for g in kept for e in groups[g]]
    ids = sorted(within, key=lambda e: (-value[e], e))[: rule.top_k]
    total = sum(score[e] for e in ids) if rule.normalize else 1.0
    return ids, [score[e] / total * rule.scale for e in ids]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 12), st.sampled_from([4, 12, 36]), st.sampled_from(RULES), st.integers(0, 2**31),
    st.booleans(),
)  # fmt: skip
def test_against_loops(
    tokens: int, experts: int, rule: RouterOptions, seed: int, ties: bool
) -> None:
    if experts // rule.n_groups * rule.top_groups < rule.top_k or experts % rule.n_groups:
        return
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator) * 2
    bias = torch.randn(experts, generator=generator) * 0.3
    if ties:  # duplicated experts; and values spaced so that fp32 and fp64 order them alike
        logits, bias = logits.round(), torch.zeros(experts)
        if rule.n_groups > 1 and not rule.softmax:
            logits = logits.sign() * 0.0  # a sum of two scores rounds: all equal, or none
    ids, weights, counts = route(logits, bias, rule)
    assert ids.dtype == counts.dtype == torch.int64 and ids.shape == (tokens, rule.top_k)
    for t in range(tokens):
        expected = loop(logits[t].tolist(), bias.tolist(), rule)
        assert ids[t].tolist() == expected[0]
        torch.testing.assert_close(weights[t], torch.tensor(expected[1]), rtol=1e-6, atol=1e-6)
    assert counts.tolist() == [int((ids == e).sum()) for e in range(experts)]
    again = route(logits, bias, rule, ids)
    assert torch.equal(again[0], ids) and torch.equal(again[1], weights)
    assert torch.equal(again[2], counts)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("replayed", [False, True])
def test_gradient(rule: RouterOptions, replayed: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, 12, requires_grad=True)
    ids, weights, _ = route(logits, torch.zeros(12), rule)
    assert not ids.requires_grad
    if replayed:
        weights = route(logits, torch.zeros(12), rule, ids)[1]
    grad = torch.randn_like(weights)
    (ours,) = torch.autograd.grad(weights, logits, grad)
    exact = logits.detach().double().requires_grad_()
    reference = router.route_reference(exact, torch.zeros(12), rule, ids)[1]
    (expected,) = torch.autograd.grad(reference, exact, grad.double())
    assert (ours - expected).norm() < 1e-6 * expected.norm()


def test_given_twice() -> None:
    """A choice that contains an expert twice gets both gradients."""
    logits = torch.randn(1, 3, requires_grad=True)
    ids, rule = torch.tensor([[1, 1]]), RouterOptions(2, True, normalize=False)
    (ours,) = torch.autograd.grad(route(logits, torch.zeros(3), rule, ids)[1].sum(), logits)
    (expected,) = torch.autograd.grad(2 * logits.softmax(-1)[0, 1], logits)
    torch.testing.assert_close(ours, expected)
