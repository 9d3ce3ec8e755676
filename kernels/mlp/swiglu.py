"""SwiGLU with the routing weight folded in: `h = silu(gate) * up * weight`, and GPT-OSS's variant.

Why fused: only element-wise operations are between the two expert projections; one pass reads
gate and up once and writes h once. Backward saves only gate and up (the projection's output) and
recomputes silu. On request it also returns h, so that the gradient of the down projection's weight
needs no saved h either. Arithmetic is fp32, storage the operands' dtype. The routing weight may be
applied here, before the down projection, because that projection is linear:
`w * (W2 @ h) = W2 @ (w * h)`; combining the rows is then a plain sum.

`clamped_swiglu` (GPT-OSS): `h = (up + 1) * gate * sigmoid(1.702 gate) * weight`, with the gate at
most 7 and up within +-7; clamped values have no gradient.

For products in FP8 the results are quantized and never written in bf16: `swiglu_quantized`
and `swiglu_backward_quantized` return the bits of quantizing the results of `swiglu` and
`swiglu_backward`. The latter accepts gate and up in FP8 too, as DeepSeek-V3 keeps them
(arXiv:2412.19437, section 3.3.3). Both are called within a recipe's own backward and have no
gradient.

SwiGLU: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202. F hidden width, R rows,
E groups of rows (experts), f = ceil(F / 128).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import device
from kernels.fp8 import Quantized, empty_columns, empty_rows, fp8_dtype
from kernels.mlp import swiglu_cpu
from kernels.mlp.swiglu_cpu import ALPHA, LIMIT
from kernels.quantization.quantize import (
    dequantize_1x128,
    quantize_1x128,
    quantize_128x1,
    quantize_128x1_grouped,
)

Activation = Literal["swiglu", "clamped_swiglu"]
CLAMPED: Activation = "clamped_swiglu"


class QuantizedGradients(NamedTuple):
    """Operands of the two backward products of each projection."""

    gate_up_rows: Quantized
    """Gradient of gate and up, 1x128: for the gradient of the input."""
    gate_up_columns: Quantized
    """The same, 128x1 within groups: for the gradient of the up projection's weight."""
    h_columns: Quantized
    """h, 128x1 within groups: for the gradient of the down projection's weight."""
    weights_R: Tensor
    """Gradient of the routing weights, fp32; empty if there are none."""


def swiglu(
    gate_up_R2F: Tensor, weights_R: Tensor | None = None, activation: Activation = "swiglu"
) -> Tensor:
    """`h_RF`; gate is the first half of the last dimension, up the second.

    weights_R: fp32 factor per row, or None for 1. Differentiable in both.
    """
    h_RF: Tensor = _swiglu(gate_up_R2F, weights_R, activation)
    return h_RF


def swiglu_backward(
    grad_RF: Tensor,
    gate_up_R2F: Tensor,
    weights_R: Tensor | None,
    activation: Activation = "swiglu",
    with_h: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `swiglu` for gate_up (its dtype) and weights (fp32), and h in the same pass.

    The second result is empty without weights, the third unless `with_h`.
    """
    found: tuple[Tensor, Tensor, Tensor] = _swiglu_backward(
        grad_RF, gate_up_R2F, weights_R, activation, with_h
    )
    return found


def swiglu_quantized(
    gate_up_R2F: Tensor,
    weights_R: Tensor | None,
    activation: Activation = "swiglu",
    power_of_two: bool = False,
) -> Quantized:
    """`quantize_1x128(swiglu(...))`, bit by bit, in one pass."""
    return Quantized(*_swiglu_quantized(gate_up_R2F, weights_R, activation, power_of_two))


def swiglu_backward_quantized(
    grad_RF: Tensor,
    gate_up_R2F: Tensor,
    weights_R: Tensor | None,
    activation: Activation = "swiglu",
    power_of_two: bool = False,
    ends_E: Tensor | None = None,
    counts_E: Tensor | None = None,
    scales: Tensor | None = None,
) -> QuantizedGradients:
    """`swiglu_backward` with h, everything quantized for the following products, in one pass.

    Args:
        grad_RF: Gradient of h.
        gate_up_R2F: In grad's dtype, or FP8 data with its `scales` of `quantize_1x128`.
        weights_R: fp32 factor per row, or None.
        activation: The activation function.
        power_of_two: Round scales up to powers of two.
        ends_E, counts_E: As in `grouped_gemm_nt`; None for one group of all rows. Blocks of 128
            rows restart in every group: the index of a row's block counts the earlier groups, each
            rounded up to whole blocks, and scales are `[R // 128 + E, D]`, 2^-80 where there is no
            block. Rows between a group's true rows and its end are treated as zero; rows beyond the
            last end are undefined in the results, except the gradient of their weights, which is
            zero.
        scales: Of gate_up_R2F, if that is FP8.
    """
    found = _swiglu_backward_quantized(
        grad_RF, gate_up_R2F, weights_R, activation, power_of_two, ends_E, counts_E, scales
    )
    rows, columns, h = (Quantized(*found[i : i + 2]) for i in (0, 2, 4))
    return QuantizedGradients(rows, columns, h, found[6])


def swiglu_reference(
    gate_up_R2F: Tensor, weights_R: Tensor | None = None, activation: Activation = "swiglu"
) -> Tensor:
    """Plain-torch form of `swiglu`."""
    gate, up, alpha = _factors(gate_up_R2F, activation)
    h_RF = F.silu(gate).mul_(up)
    if weights_R is not None:
        h_RF.mul_(weights_R[:, None])
    if alpha != 1:
        h_RF.div_(alpha)
    return h_RF.to(gate_up_R2F.dtype)


def swiglu_backward_reference(
    grad_RF: Tensor,
    gate_up_R2F: Tensor,
    weights_R: Tensor | None,
    activation: Activation = "swiglu",
    with_h: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain-torch form of `swiglu_backward`; results have grad's dtype.

    Temporaries are reused in place: on a CPU allocating memory costs more than arithmetic.
    """
    gate, up, alpha = _factors(gate_up_R2F, activation)
    grad = grad_RF.to(torch.float32, copy=True)
    grad_up = F.silu(gate)
    if alpha != 1:
        grad_up.div_(alpha)
    h = grad_RF.new_empty(0)
    if with_h:
        h = grad_up * up
        h = (h if weights_R is None else h.mul_(weights_R[:, None])).to(grad_RF.dtype)
    grad_up.mul_(grad)
    grad_weights = grad_RF.new_empty(0)
    if weights_R is not None:
        grad_weights = torch.linalg.vecdot(grad_up, up)
        grad_up.mul_(weights_R[:, None])
        grad.mul_(weights_R[:, None])
    grad_gate = torch.ops.aten.silu_backward(grad.mul_(up), gate)
    if activation == "clamped_swiglu":
        raw_gate, raw_up = gate_up_R2F.chunk(2, dim=-1)
        grad_gate.masked_fill_(raw_gate > LIMIT, 0)
        grad_up.masked_fill_(raw_up.abs() > LIMIT, 0)
    grad_gate_up = torch.empty_like(gate_up_R2F, dtype=grad_RF.dtype)
    grad_gate_up[:, : grad.shape[1]] = grad_gate
    grad_gate_up[:, grad.shape[1] :] = grad_up
    return grad_gate_up, grad_weights, h


def swiglu_backward_quantized_reference(
    grad_RF: Tensor,
    gate_up_R2F: Tensor,
    weights_R: Tensor | None,
    activation: Activation = "swiglu",
    power_of_two: bool = False,
    ends_E: Tensor | None = None,
    counts_E: Tensor | None = None,
    scales: Tensor | None = None,
) -> QuantizedGradients:
    """Plain-torch form of `swiglu_backward_quantized`; rows outside every group are zero."""
    backward = partial(swiglu_backward_reference, activation=activation, with_h=True)
    groups = (ends_E, counts_E, scales)
    return _backward_quantized(backward, grad_RF, gate_up_R2F, weights_R, power_of_two, *groups)


def _backward_quantized(
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]], grad_RF: Tensor, gate_up_R2F: Tensor,
    weights_R: Tensor | None, power_of_two: bool, ends_E: Tensor | None, counts_E: Tensor | None,
    scales: Tensor | None,
) -> QuantizedGradients:  # fmt: skip
    if scales is not None:
        gate_up_R2F = dequantize_1x128(gate_up_R2F, scales)
    if ends_E is not None and counts_E is not None:
        outside_R1 = _outside(len(grad_RF), ends_E, counts_E)[:, None]
        grad_RF = grad_RF.masked_fill(outside_R1, 0)
        gate_up_R2F = gate_up_R2F.masked_fill(outside_R1, 0)
    grad_gate_up, grad_weights, h = backward(grad_RF, gate_up_R2F, weights_R)
    return QuantizedGradients(
        quantize_1x128(grad_gate_up, power_of_two),
        _quantize_columns(grad_gate_up, ends_E, counts_E, power_of_two),
        _quantize_columns(h, ends_E, counts_E, power_of_two),
        grad_weights,
    )


def _factors(gate_up_R2F: Tensor, activation: Activation) -> tuple[Tensor, Tensor, float]:
    """fp32 `a` and `b`, and `c`, with `h = silu(a) * b / c`: x sigmoid(c x) is silu(c x) / c."""
    gate, up = gate_up_R2F.float().chunk(2, dim=-1)
    if activation == "swiglu":
        return gate, up, 1.0
    return gate.clamp(max=LIMIT).mul_(ALPHA), up.clamp(-LIMIT, LIMIT).add_(1), ALPHA


def _outside(n_rows: int, ends_E: Tensor, counts_E: Tensor) -> Tensor:
    """Mask of the rows that are not true rows of any group."""
    rows_R = torch.arange(n_rows, device=ends_E.device)
    group_R = torch.searchsorted(ends_E, rows_R, right=True).clamp(max=len(ends_E) - 1)
    starts_E = F.pad(ends_E, (1, 0))[:-1]
    return (rows_R >= (starts_E + counts_E)[group_R]) | (rows_R >= ends_E[-1])


def _quantize_columns(
    x_RD: Tensor, ends_E: Tensor | None, counts_E: Tensor | None, power_of_two: bool
) -> Quantized:
    """128x1, restarted in every group."""
    if ends_E is None or counts_E is None:
        return quantize_128x1(x_RD, power_of_two)
    return quantize_128x1_grouped(x_RD, ends_E, counts_E, power_of_two)


@torch.library.custom_op("phalanx::swiglu", mutates_args=())
def _swiglu(gate_up_R2F: Tensor, weights_R: Tensor | None, activation: str) -> Tensor:
    if device.on_accelerator(gate_up_R2F):
        from kernels.mlp.swiglu_triton import swiglu_forward

        with device.launching_on(gate_up_R2F):
            return swiglu_forward(gate_up_R2F, weights_R, activation)
    return swiglu_cpu.forward(gate_up_R2F, weights_R, _known(activation) == CLAMPED)


@_swiglu.register_fake
def _(gate_up_R2F: Tensor, weights_R: Tensor | None, activation: str) -> Tensor:
    return gate_up_R2F.new_empty(gate_up_R2F.shape[0], gate_up_R2F.shape[1] // 2)


@torch.library.custom_op("phalanx::swiglu_backward", mutates_args=())
def _swiglu_backward(
    grad_RF: Tensor, gate_up_R2F: Tensor, weights_R: Tensor | None, activation: str, with_h: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if device.on_accelerator(grad_RF):
        from kernels.mlp import swiglu_triton

        with device.launching_on(grad_RF):
            return swiglu_triton.swiglu_backward(
                grad_RF, gate_up_R2F, weights_R, activation, with_h
            )
    clamped = _known(activation) == CLAMPED
    return swiglu_cpu.backward(grad_RF, gate_up_R2F, weights_R, clamped, with_h)


@_swiglu_backward.register_fake
def _(
    grad_RF: Tensor, gate_up_R2F: Tensor, weights_R: Tensor | None, activation: str, with_h: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        gate_up_R2F.new_empty(gate_up_R2F.shape),
        grad_RF.new_empty(0) if weights_R is None else weights_R.new_empty(weights_R.shape),
        grad_RF.new_empty(grad_RF.shape if with_h else 0),
    )


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None, str], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor | None, None]:
    gate_up_R2F, weights_R = ctx.saved_tensors
    grad_gate_up, grad_weights, _ = _swiglu_backward(
        grad_RF, gate_up_R2F, weights_R, ctx.activation, False
    )
    return grad_gate_up, None if weights_R is None else grad_weights, None


_swiglu.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("phalanx::swiglu_quantized", mutates_args=())
def _swiglu_quantized(
    gate_up_R2F: Tensor, weights_R: Tensor | None, activation: str, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    if device.on_accelerator(gate_up_R2F):
        from kernels.mlp import swiglu_fp8_triton

        with device.launching_on(gate_up_R2F):
            return swiglu_fp8_triton.forward(
                gate_up_R2F, weights_R, activation, fp8_dtype(gate_up_R2F.device), power_of_two
            )
    h_RF = swiglu_cpu.forward(gate_up_R2F, weights_R, _known(activation) == CLAMPED)
    return quantize_1x128(h_RF, power_of_two)


@_swiglu_quantized.register_fake
def _(
    gate_up_R2F: Tensor, weights_R: Tensor | None, activation: str, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    shape = gate_up_R2F.shape[0], gate_up_R2F.shape[1] // 2
    return empty_rows(shape, gate_up_R2F.device)


@torch.library.custom_op("phalanx::swiglu_backward_quantized", mutates_args=())
def _swiglu_backward_quantized(
    grad_RF: Tensor, gate_up_R2F: Tensor, weights_R: Tensor | None, activation: str,
    power_of_two: bool, ends_E: Tensor | None, counts_E: Tensor | None, scales: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    groups = (ends_E, counts_E, scales)
    if device.on_accelerator(grad_RF):
        from kernels.mlp import swiglu_fp8_triton

        with device.launching_on(grad_RF):
            rows, columns, h, grad_weights = swiglu_fp8_triton.backward(
                grad_RF, gate_up_R2F, weights_R, activation, fp8_dtype(grad_RF.device),
                power_of_two, *groups,
            )  # fmt: skip
    else:
        backward = partial(swiglu_cpu.backward, clamped=_known(activation) == CLAMPED, with_h=True)
        rows, columns, h, grad_weights = _backward_quantized(
            backward, grad_RF, gate_up_R2F, weights_R, power_of_two, *groups
        )
    return *rows, *columns, *h, grad_weights


@_swiglu_backward_quantized.register_fake
def _(
    grad_RF: Tensor, gate_up_R2F: Tensor, weights_R: Tensor | None, activation: str,
    power_of_two: bool, ends_E: Tensor | None, counts_E: Tensor | None, scales: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    (R, D), here = grad_RF.shape, grad_RF.device
    weights = grad_RF.new_empty(0) if weights_R is None else weights_R.new_empty(weights_R.shape)
    return (
        *empty_rows((R, 2 * D), here),
        *empty_columns((R, 2 * D), ends_E, here),
        *empty_columns((R, D), ends_E, here),
        weights,
    )


def _known(activation: str) -> Activation:
    for known in get_args(Activation):
        if activation == known:
            return cast(Activation, known)
    raise ValueError(f'activation {activation!r}: use "swiglu" or "clamped_swiglu"')
