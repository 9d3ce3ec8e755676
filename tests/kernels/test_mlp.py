"""Experts that recompute h: the same values and gradients, and less memory kept."""

import pytest
import torch
from torch import Tensor

from kernels.grouped_gemm.grouped_gemm import grouped_gemm_nt
from kernels.mlp.mlp import swiglu_mlp
from kernels.mlp.swiglu import Activation, swiglu

SIZES, COUNTS = [70, 0, 1, 40], [66, 0, 1, 0]
D, F = 24, 40


def plain(
    x: Tensor, w13: Tensor, w2: Tensor, ends: Tensor, counts: Tensor, weights: Tensor,
    activation: Activation,
) -> Tensor:  # fmt: skip
    gate_up = grouped_gemm_nt(x, w13, ends, counts)
    return grouped_gemm_nt(swiglu(gate_up, weights, activation), w2, ends, counts)


def batch(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    ends, counts = torch.tensor(SIZES).cumsum(0), torch.tensor(COUNTS)
    R, E = int(ends[-1]), len(SIZES)
    true_R = torch.zeros(R)
    for end, size, count in zip(ends.tolist(), SIZES, COUNTS, strict=True):
        true_R[end - size : end - size + count] = 1
    x, grad = (torch.randn(R, D) * true_R[:, None] for _ in range(2))
    w13, w2 = torch.randn(E, 2 * F, D) / 5, torch.randn(E, D, F) / 6
    leaves = [t.to(dtype).requires_grad_() for t in (x, w13, w2)]
    leaves.append((torch.rand(R) * true_R).requires_grad_())
    return leaves, grad.to(dtype), ends, counts


@pytest.mark.parametrize("activation", ["swiglu", "clamped_swiglu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_its_parts(activation: Activation, dtype: torch.dtype) -> None:
    """Bit-identical, except w2's gradient, whose h is computed in another pass."""
    (x, w13, w2, weights), grad, ends, counts = batch(dtype)
    results = []
    for function in (swiglu_mlp, plain):
        y = function(x, w13, w2, ends, counts, weights, activation)
        results.append([y, *torch.autograd.grad(y, (x, w13, w2, weights), grad)])
    for i, (ours, parts) in enumerate(zip(*results, strict=True)):
        if i == 3:
            difference = (ours.float() - parts.float()).norm() / parts.float().norm()
            assert difference < (1e-2 if dtype == torch.bfloat16 else 1e-6)
        else:
            assert torch.equal(ours, parts)


def test_what_is_kept() -> None:
    (x, w13, w2, weights), _, ends, counts = batch(torch.bfloat16)
    own: dict[str, int] = {}
    for name, function in (("again", swiglu_mlp), ("kept", plain)):
        saved: dict[int, int] = {}

        def keep(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            function(x, w13, w2, ends, counts, weights, "swiglu")
        given = {t.data_ptr() for t in (x, w13, w2, weights, ends, counts)}
        own[name] = sum(n for at, n in saved.items() if at not in given)
    rows = sum(SIZES)
    assert own == {"again": rows * 2 * F * 2, "kept": rows * 3 * F * 2}


def test_frozen_weights() -> None:
    (x, w13, w2, weights), grad, ends, counts = batch(torch.float32)
    leaves = x, w13.detach(), w2.detach(), ends, counts, weights.detach()
    ours = torch.autograd.grad(swiglu_mlp(*leaves), x, grad)[0]
    assert torch.equal(ours, torch.autograd.grad(plain(*leaves, "swiglu"), x, grad)[0])
