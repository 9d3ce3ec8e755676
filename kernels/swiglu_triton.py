"""Triton form of `kernels.swiglu`: one pass over gate and up, forward and backward.

Each program takes one row and a block of its columns; offsets are 64-bit, since rows x columns
passes 2^31 at 128 k rows of a wide model. The gradient of the routing weight is a sum over the
row, so in backward a program loops over the columns of its row: deterministic, no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST_BLOCK = 1024


def swiglu_forward(gate_up_R2F: Tensor, weights_R: Tensor | None) -> Tensor:
    """`kernels.swiglu.swiglu` without autograd; contiguous rows."""
    gate_up_R2F = gate_up_R2F.contiguous()
    n_rows, width = gate_up_R2F.shape[0], gate_up_R2F.shape[1] // 2
    h_RF = gate_up_R2F.new_empty(n_rows, width)
    if h_RF.numel():
        block = min(_LARGEST_BLOCK, triton.next_power_of_2(width))
        _forward[(n_rows, triton.cdiv(width, block))](
            gate_up_R2F, weights_R, h_RF, width, WEIGHTED=weights_R is not None, BLOCK=block
        )
    return h_RF


def swiglu_backward(
    grad_RF: Tensor, gate_up_R2F: Tensor, weights_R: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`kernels.swiglu.swiglu_backward_reference` in one pass."""
    gate_up_R2F = gate_up_R2F.contiguous()
    n_rows, width = grad_RF.shape
    grad_gate_up = torch.empty_like(gate_up_R2F)
    grad_weights = None if weights_R is None else torch.zeros_like(weights_R)
    if grad_RF.numel():
        block = min(_LARGEST_BLOCK, triton.next_power_of_2(width))
        _backward[(n_rows,)](
            grad_RF.contiguous(), gate_up_R2F, weights_R, grad_gate_up, grad_weights, width,
            WEIGHTED=weights_R is not None, BLOCK=block,
        )  # fmt: skip
    return grad_gate_up, grad_weights


@triton.jit
def _forward(gate_up_ptr, weights_ptr, h_ptr, width, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    base = gate_up_ptr + row * 2 * width + columns
    gate = tl.load(base, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(base + width, mask=inside, other=0.0).to(tl.float32)
    h = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        h = h * tl.load(weights_ptr + row)
    tl.store(h_ptr + row * width + columns, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad_ptr, gate_up_ptr, weights_ptr, grad_gate_up_ptr, grad_weights_ptr, width,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weights_ptr + row)
    grad_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        base = row * 2 * width + columns
        gate = tl.load(gate_up_ptr + base, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + base + width, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        if WEIGHTED:
            grad_weight += grad * silu * up
        grad = grad * weight
        grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
        out = grad_gate_up_ptr + base
        tl.store(out, grad_gate.to(out.dtype.element_ty), mask=inside)
        tl.store(out + width, (grad * silu).to(out.dtype.element_ty), mask=inside)
    if WEIGHTED:
        tl.store(grad_weights_ptr + row, tl.sum(grad_weight))
