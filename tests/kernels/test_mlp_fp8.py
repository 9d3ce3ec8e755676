"""The FP8 feed-forward against its definition, product by product, in plain torch."""

from unittest import mock

import pytest
import torch
from torch import Tensor

import kernels.mlp.mlp_fp8 as module
from kernels.gemm.linear_fp8 import Fp8Weight
from kernels.mlp.mlp_fp8 import Groups, grouped_linear_fp8, swiglu_mlp_fp8
from kernels.mlp.swiglu import Activation, swiglu, swiglu_backward
from kernels.quantization.quantize import (
    dequantize_1x128,
    dequantize_128x1,
    dequantize_128x128,
    quantize_1x128,
    quantize_1x128_128x1_grouped,
    quantize_128x1,
)

SIZES = [(130, 120), (0, 0), (1, 1), (40, 0), (300, 300)]
"""Number of rows and of true rows of each group."""
D, F = 200, 136


def rows_of(x: Tensor) -> Tensor:
    return dequantize_1x128(*quantize_1x128(x)).to(x.dtype)


def columns_of(x: Tensor) -> Tensor:
    return dequantize_128x1(*quantize_128x1(x)).to(x.dtype)


def by_definition(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, grad: Tensor, activation: Activation
) -> list[Tensor]:
    """Output and the gradients of x, w13, w2 and weights, for the rows of one expert, in fp32."""
    a, b = (dequantize_128x128(q.data, q.scales) for q in map(Fp8Weight.of, (w13, w2)))
    gate_up = rows_of(x) @ a.T
    y = rows_of(swiglu(gate_up, weights, activation)) @ b.T
    kept = rows_of(gate_up)
    grad_h = rows_of(grad) @ b
    grad_gate_up, grad_weights, h = swiglu_backward(grad_h, kept, weights, activation, True)
    grad_w2 = columns_of(grad).T @ columns_of(h)
    grad_w13 = columns_of(grad_gate_up).T @ columns_of(x)
    return [y, rows_of(grad_gate_up) @ a, grad_w13, grad_w2, grad_weights]


def batch(largest: float = 2.0) -> tuple[list[Tensor], Tensor, Groups, Tensor]:
    """x, w13, w2 and weights; the gradient of the output; groups; a mask of true rows.

    The rows of x have different magnitudes, from 10^-2 to 10^largest.
    """
    torch.manual_seed(0)
    ends = torch.tensor([size for size, _ in SIZES]).cumsum(0)
    counts = torch.tensor([true for _, true in SIZES])
    true_R = torch.zeros(int(ends[-1]), dtype=torch.bool)
    for end, (size, count) in zip(ends.tolist(), SIZES, strict=True):
        true_R[end - size : end - size + count] = True
    R = len(true_R)
    x = torch.randn(R, D) * torch.logspace(-2, largest, R)[:, None]
    leaves = [x, torch.randn(len(SIZES), 2 * F, D) / 10, torch.randn(len(SIZES), D, F) / 10]
    weights, grad = torch.rand(R), torch.randn(R, D)
    for tensor in (leaves[0], weights, grad):
        tensor[~true_R] = 0
    leaves.append(weights)
    return [leaf.requires_grad_() for leaf in leaves], grad, Groups(ends, counts), true_R


def relative(ours: Tensor, reference: Tensor) -> float:
    difference = (ours.detach() - reference.detach()).norm()
    return float(difference / reference.detach().norm().clamp(min=1e-30))


@pytest.mark.parametrize("activation", ["swiglu", "clamped_swiglu"])
@pytest.mark.parametrize("fp8_rows", [False, True])
def test_experts(activation: Activation, fp8_rows: bool) -> None:
    """Rows received in FP8 keep their quantization; the weight gradient quantizes them again."""
    (x, w13, w2, weights), grad, groups, _ = batch()
    given = quantize_1x128(x.detach()) if fp8_rows else None
    y = swiglu_mlp_fp8(
        x, w13, w2, Fp8Weight.of(w13), Fp8Weight.of(w2), weights_R=weights, groups=groups,
        rows=given, activation=activation,
    )  # fmt: skip
    ours = torch.autograd.grad(y, (x, w13, w2, weights), grad)
    start = 0
    for e, (size, _) in enumerate(SIZES):
        rows = slice(start, start + size)
        start += size
        of_x = rows_of(x.detach()[rows]) if fp8_rows else x.detach()[rows]
        expected = by_definition(
            of_x, w13.detach()[e], w2.detach()[e], weights.detach()[rows], grad[rows], activation
        )
        got = [y.detach()[rows], ours[0][rows], ours[1][e], ours[2][e], ours[3][rows]]
        # products in another order occasionally change a rounding to FP8 (6 percent of an element)
        for name, a, b in zip(("y", "dx", "dw13", "dw2", "dweights"), got, expected, strict=True):
            assert relative(a, b) < 2e-3, (e, name)


def test_near_the_exact_feed_forward() -> None:
    """The error of FP8 is a few percent of each row, although rows differ in magnitude by a factor
    of 100. (With far larger gates the gradient of SwiGLU depends on their sign, in the exact
    computation too.)"""
    (x, w13, w2, weights), grad, groups, true_R = batch(0.0)
    y = swiglu_mlp_fp8(
        x, w13, w2, Fp8Weight.of(w13), Fp8Weight.of(w2), weights_R=weights, groups=groups
    )
    ours = [y, *torch.autograd.grad(y, (x, w13, w2, weights), grad)]
    parts, start = [], 0
    for e, (size, _) in enumerate(SIZES):
        rows = slice(start, start + size)
        start += size
        parts.append(swiglu(x[rows] @ w13[e].T, weights[rows]) @ w2[e].T)
    exact = torch.cat(parts)
    theirs = [exact, *torch.autograd.grad(exact, (x, w13, w2, weights), grad)]
    for name, a, b in zip(("y", "dx", "dw13", "dw2", "dweights"), ours, theirs, strict=True):
        # up to five quantized operands are involved, each with an error of 2.6 percent of its norm
        assert 1e-3 < relative(a, b) < 0.1, name
    row_error = (ours[0] - exact)[true_R].norm(dim=1) / exact[true_R].norm(dim=1)
    assert row_error.max() < 0.2


def test_one_group_is_a_dense_feed_forward() -> None:
    torch.manual_seed(0)
    x, w13, w2 = torch.randn(150, D), torch.randn(1, 2 * F, D) / 10, torch.randn(1, D, F) / 10
    grad, ends = torch.randn(150, D), torch.tensor([150])
    results = []
    for dense in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, w13[0] if dense else w13)]
        last = (w2[0] if dense else w2).clone().requires_grad_()
        y = swiglu_mlp_fp8(
            leaves[0], leaves[1], last, Fp8Weight.of(leaves[1]), Fp8Weight.of(last),
            groups=None if dense else Groups(ends, ends),
        )  # fmt: skip
        results.append([y, *torch.autograd.grad(y, (*leaves, last), grad)])
    for a, b in zip(*results, strict=True):
        assert relative(a.reshape(-1), b.reshape(-1)) < 1e-6


def test_what_is_kept() -> None:
    """Kept are one byte per element of x, gate and up, and their scales; neither h nor any bf16
    tensor."""
    torch.manual_seed(0)
    x, w13, w2 = torch.randn(256, 256).bfloat16(), torch.randn(512, 256), torch.randn(256, 256)
    leaves = [t.bfloat16().requires_grad_() for t in (x, w13, w2)]
    x_leaf, up, down = leaves
    fp8 = Fp8Weight.of(up), Fp8Weight.of(down)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        swiglu_mlp_fp8(x_leaf, up, down, *fp8)
    given = {part.data_ptr() for weight in fp8 for part in weight}
    own = sum(t.nbytes for t in saved if t.data_ptr() not in given)
    assert own == 256 * (256 + 512) + 4 * (2 * 256 + 256 * 4)


def test_rows_in_fp8_enter_as_they_are() -> None:
    (x, w13, w2, weights), _, groups, _ = batch()
    given = quantize_1x128(x.detach())
    stand_in = torch.zeros(1).expand(x.shape).requires_grad_()
    with (
        torch.no_grad(),
        mock.patch.object(module, "quantize_1x128", wraps=quantize_1x128) as quantised,
        mock.patch.object(
            module, "quantize_1x128_128x1_grouped", wraps=quantize_1x128_128x1_grouped
        ) as both,
        mock.patch.object(module, "grouped_gemm_fp8_nt", wraps=module.grouped_gemm_fp8_nt) as nt,
    ):
        swiglu_mlp_fp8(
            stand_in, w13, w2, Fp8Weight.of(w13), Fp8Weight.of(w2), weights_R=weights,
            groups=groups, rows=given,
        )  # fmt: skip
    assert not both.called and not quantised.called  # h is bf16 within SwiGLU, but nothing is kept
    assert nt.call_args_list[0].args[0] is given.data


def test_grouped_linear() -> None:
    (x, w13, *_), _, groups, true_R = batch()
    w = w13.detach().requires_grad_()
    grad = torch.randn(len(x), w.shape[1]) * true_R[:, None]
    y = grouped_linear_fp8(x, w, Fp8Weight.of(w), groups)
    dx, dw = torch.autograd.grad(y, (x, w), grad)
    start = 0
    for e, (size, _) in enumerate(SIZES):
        rows = slice(start, start + size)
        start += size
        quantized = Fp8Weight.of(w[e])
        plain = dequantize_128x128(quantized.data, quantized.scales)
        assert relative(y[rows], rows_of(x.detach()[rows]) @ plain.T) < 1e-6
        assert relative(dx[rows], rows_of(grad[rows]) @ plain) < 1e-6
        expected = columns_of(grad[rows]).T @ columns_of(x.detach()[rows])
        assert relative(dw[e], expected) < 1e-6


def test_frozen_weights_need_no_columns() -> None:
    (x, w13, w2, weights), grad, groups, _ = batch()
    fp8 = Fp8Weight.of(w13), Fp8Weight.of(w2)
    expected = torch.autograd.grad(
        swiglu_mlp_fp8(x, w13, w2, *fp8, weights_R=weights, groups=groups), x, grad
    )[0]
    y = swiglu_mlp_fp8(
        x, w13.detach(), w2.detach(), *fp8, weights_R=weights, groups=groups
    )  # fmt: skip
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], expected)
