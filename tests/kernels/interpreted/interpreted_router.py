"""Interpreter tests: the router's kernels against their references. Scores differ in the last bits
of the exponential, so weights agree within 1e-6, and gradients within 1e-6 of their norm."""

import pytest
import torch
from torch import Tensor

from kernels.moe import router, router_triton
from kernels.moe.router import RouterOptions
from tests.kernels.interpreted.lane import kernels_on_cpu, relative

CASES = [
    (9, 256, RouterOptions(8, False, 8, 4, True, 2.5)),  # DeepSeek-V3
    (9, 128, RouterOptions(8, True)),  # Qwen3
    (1, 8, RouterOptions(2, True)),  # Mixtral
    (5, 160, RouterOptions(6, True, 8, 3, False, 16.0)),  # DeepSeek-V2: groups of 20
    (5, 12, RouterOptions(3, False, 12, 4)),  # groups of one
    (3, 1, RouterOptions(1, False, normalize=False)),
    (0, 8, RouterOptions(2, True)),
]


@pytest.mark.parametrize("kind", ["plain", "skewed", "equal"])
@pytest.mark.parametrize(("tokens", "experts", "rule"), CASES, ids=str)
def test_route(
    tokens: int, experts: int, rule: RouterOptions, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_triton, "_ENOUGH", 2)  # several tokens per program
    logits, bias = torch.randn(tokens, experts), torch.randn(experts) * 0.2
    if kind == "skewed":
        bias[: rule.top_k] = 100
    if kind == "equal":
        logits, bias = logits[:, :1].expand(-1, experts).round(), torch.zeros(experts)
    logits.requires_grad_()
    results: list[list[Tensor]] = []
    with kernels_on_cpu():
        ids, weights, counts = router.route(logits, bias, rule)
        grad = torch.randn_like(weights.detach())
        results.append([weights, *torch.autograd.grad(weights, logits, grad)])
        *_, replayed, counted = router.route(logits, bias, rule, ids)
        results.append([replayed, *torch.autograd.grad(replayed, logits, grad)])
    expected = router.route_reference(logits, bias, rule)
    assert torch.equal(ids, expected[0])
    assert torch.equal(counts, expected[2]) and torch.equal(counted, counts)
    if kind == "equal":
        assert ids.tolist() == [[*range(rule.top_k)]] * tokens or rule.top_groups < rule.n_groups
    reference = router.route_backward_reference(grad, logits.detach(), ids, rule)
    for ours, gradient in results:
        torch.testing.assert_close(ours, expected[1], rtol=1e-6, atol=1e-6)
        assert not tokens or not reference.norm() or relative(gradient, reference) < 2e-6


def test_not_a_number_stays_inside() -> None:
    logits = torch.full((2, 6), float("nan"))
    with kernels_on_cpu():
        ids, weights, _ = router.route(logits, torch.zeros(6), RouterOptions(2, True))
    assert ((ids >= 0) & (ids < 6)).all() and weights.isnan().all()
