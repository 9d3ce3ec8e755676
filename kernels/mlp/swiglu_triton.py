"""Triton form of `kernels.mlp.swiglu`: one pass over gate and up, forward and backward.

Each program takes one row and a block of its columns; offsets are 64-bit, since rows x columns
passes 2^31 at 128 k rows of a wide model. The gradient of the routing weight is a sum over the
row, so in backward a program loops over the columns of its row: deterministic, no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST_BLOCK = 1024
_LIMIT = tl.constexpr(7.0)
_ALPHA = tl.constexpr(1.702)


def swiglu_forward(gate_up_R2F: Tensor, weights_R: Tensor | None, activation: str) -> Tensor:
    """`kernels.mlp.swiglu.swiglu` without autograd; contiguous rows."""
    gate_up_R2F = gate_up_R2F.contiguous()
    n_rows, width = gate_up_R2F.shape[0], gate_up_R2F.shape[1] // 2
    h_RF = gate_up_R2F.new_empty(n_rows, width)
    if h_RF.numel():
        block = min(_LARGEST_BLOCK, triton.next_power_of_2(width))
        _forward[(n_rows, triton.cdiv(width, block))](
            gate_up_R2F, weights_R, h_RF, width, CLAMPED=activation == "clamped_swiglu",
            BLOCK=block,
        )  # fmt: skip
    return h_RF


def swiglu_backward(
    grad_RF: Tensor, gate_up_R2F: Tensor, weights_R: Tensor | None, activation: str, with_h: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.mlp.swiglu.swiglu_backward` in one pass; results have grad's dtype."""
    gate_up_R2F = gate_up_R2F.contiguous()
    n_rows, width = grad_RF.shape
    grad_gate_up = grad_RF.new_empty(n_rows, 2 * width)
    grad_weights = grad_RF.new_empty(0) if weights_R is None else torch.zeros_like(weights_R)
    h_RF = grad_RF.new_empty(grad_RF.shape if with_h else 0)
    if grad_RF.numel():
        block = min(_LARGEST_BLOCK, triton.next_power_of_2(width))
        _backward[(n_rows,)](
            grad_RF.contiguous(), gate_up_R2F, weights_R, grad_gate_up, grad_weights,
            h_RF if with_h else None, width, CLAMPED=activation == "clamped_swiglu", BLOCK=block,
        )  # fmt: skip
    return grad_gate_up, grad_weights, h_RF


@triton.jit
def factors(gate, up, CLAMPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The factor computed from the gate, its derivative, and the factor computed from up."""
    if CLAMPED:  # comparisons, not minima: those would drop NaNs
        gate = tl.where(gate > _LIMIT, _LIMIT, gate)
        up = tl.where(up > _LIMIT, _LIMIT, tl.where(up < -_LIMIT, -_LIMIT, up)) + 1
        sigmoid = tl.sigmoid(gate * _ALPHA)
        act = gate * sigmoid
        slope = sigmoid + act * _ALPHA * (1 - sigmoid)
    else:
        sigmoid = tl.sigmoid(gate)
        act = gate * sigmoid
        slope = sigmoid + act * (1 - sigmoid)
    return act, slope, up


@triton.jit
def gradients(grad, gate, up, weight, CLAMPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gradients of gate, up and weight (to be summed over columns), and h; all fp32."""
    act, slope, factor = factors(gate, up, CLAMPED)
    h = act * factor
    grad_weight = grad * h
    grad = grad * weight
    grad_gate = grad * factor * slope
    grad_up = grad * act
    if CLAMPED:
        grad_gate = tl.where(gate > _LIMIT, 0.0, grad_gate)
        grad_up = tl.where(tl.abs(up) > _LIMIT, 0.0, grad_up)
    return grad_gate, grad_up, grad_weight, h * weight


@triton.jit
def _forward(gate_up_ptr, weights_ptr, h_ptr, width, CLAMPED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    base = gate_up_ptr + row * 2 * width + columns
    gate = tl.load(base, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(base + width, mask=inside, other=0.0).to(tl.float32)
    act, _, factor = factors(gate, up, CLAMPED)
    h = act * factor
    if weights_ptr is not None:
        h = h * tl.load(weights_ptr + row)
    tl.store(h_ptr + row * width + columns, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad_ptr, gate_up_ptr, weights_ptr, grad_gate_up_ptr, grad_weights_ptr, h_ptr, width,
    CLAMPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        base = row * 2 * width + columns
        gate = tl.load(gate_up_ptr + base, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + base + width, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        grad_gate, grad_up, grad_weight, h = gradients(grad, gate, up, weight, CLAMPED)
        sums += grad_weight
        out = grad_gate_up_ptr + base
        tl.store(out, grad_gate.to(out.dtype.element_ty), mask=inside)
        tl.store(out + width, grad_up.to(out.dtype.element_ty), mask=inside)
        if h_ptr is not None:
            at = h_ptr + row * width + columns
            tl.store(at, h.to(h_ptr.dtype.element_ty), mask=inside)
    if weights_ptr is not None:
        tl.store(grad_weights_ptr + row, tl.sum(sums))
