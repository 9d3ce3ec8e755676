"""Linear layers whose three products run in blockwise FP8.

Forward quantizes x twice in one pass: per 1x128 along its width for the output, per 128x1 along the
tokens for the weight gradient. Only the second form is kept for backward, at one byte per element:
half of what a bf16 layer keeps. Backward quantizes dy the same way, once for each of its products.
x in bf16 is not kept, so the weight gradient is that of the quantized x (DeepSeek-V3,
arXiv:2412.19437, section 3.3). Layers that read the same x (queries, keys and values) share both
forms.

The weight is quantized per 128x128, once for the products of forward and backward. It changes only
when the optimizer steps, so a caller can keep the quantized form (`Fp8Weight`) and pass it to
all microbatches of a step.

Shapes: T tokens, D input width, N output width; d, n, t their numbers of blocks of 128.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.fp8 import Quantized
from kernels.gemm.gemm_fp8 import gemm_fp8_nn, gemm_fp8_nt, gemm_fp8_tn
from kernels.quantization.quantize import (
    dequantize_1x128,
    dequantize_128x1,
    dequantize_128x128,
    quantize_1x128,
    quantize_1x128_128x1,
    quantize_1x128_reference,
    quantize_128x1,
    quantize_128x1_reference,
    quantize_128x128,
)


class Fp8Weight(NamedTuple):
    """A weight `[N, D]` per 128x128, or `[E, N, D]`, one per expert."""

    data: Tensor
    transposed: Tensor
    """The same data, preferably with contiguous columns, for the product that sums over N: FP8
    tensor cores require that layout, and the product copies data in any other."""
    scales: Tensor

    @staticmethod
    def of(weight: Tensor, power_of_two: bool = False) -> "Fp8Weight":
        """Quantize a weight; without autograd."""
        (data, scales), transposed = quantize_128x128(weight.detach(), power_of_two)
        return Fp8Weight(data, transposed, scales)


def linears_fp8(
    x_TD: Tensor, weights: Sequence[Tensor], fp8_weights: Sequence[Fp8Weight],
    power_of_two: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`x @ weight.T` in x's dtype for each of several weights `[N, D]`.

    Leading dimensions of x are arbitrary. power_of_two: round all scales up to powers of two.
    Differentiable in x and the weights.
    """
    if x_TD.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"linears_fp8 takes bf16 or fp32, got {x_TD.dtype}")
    keep_x = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    # Dynamo rejects a tensor passed twice: data replaces `transposed` if both are the same tensor
    turned = tuple(weight.transposed is not weight.data for weight in fp8_weights)
    parts = [part for weight in fp8_weights for part in (weight.data, weight.scales)]
    parts += [w.transposed for w, other in zip(fp8_weights, turned, strict=True) if other]
    flat = x_TD.reshape(-1, x_TD.shape[-1])
    outputs: tuple[Tensor, ...] = _LinearsFp8.apply(
        flat, power_of_two, keep_x, turned, *weights, *parts
    )
    return tuple(y.view(*x_TD.shape[:-1], y.shape[1]) for y in outputs)


def linears_fp8_reference(
    x_TD: Tensor, weights: Sequence[Tensor], fp8_weights: Sequence[Fp8Weight],
    power_of_two: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Plain-torch form of `linears_fp8`: dequantized operands, fp32 products."""
    flat = x_TD.reshape(-1, x_TD.shape[-1])
    outputs = (
        _Reference.apply(flat, weight, fp8_weight, power_of_two)
        for weight, fp8_weight in zip(weights, fp8_weights, strict=True)
    )
    return tuple(y.view(*x_TD.shape[:-1], y.shape[1]) for y in outputs)


def _forms(
    x: Tensor, power_of_two: bool, rows: bool, columns: bool
) -> tuple[Quantized | None, Quantized | None]:
    """The requested quantized forms, in one pass."""
    if rows and columns:
        return quantize_1x128_128x1(x, power_of_two)
    return (
        quantize_1x128(x, power_of_two) if rows else None,
        quantize_128x1(x, power_of_two) if columns else None,
    )


class _LinearsFp8(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, power_of_two: bool, keep_x: bool, turned: tuple[bool, ...],
        *weights_and_parts: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        n, others = len(turned), iter(weights_and_parts[3 * len(turned) :])
        weights, parts = weights_and_parts[:n], weights_and_parts[n : 3 * n]
        by_row, by_column = _forms(x_TD, power_of_two, True, keep_x)
        assert by_row is not None
        fp8_weights = [
            Fp8Weight(data, next(others) if other else data, scales)
            for data, scales, other in zip(parts[::2], parts[1::2], turned, strict=True)
        ]
        kept = [part for weight in fp8_weights for part in (weight.transposed, weight.scales)]
        ctx.save_for_backward(*kept, *(by_column or ()))
        ctx.n, ctx.power_of_two = n, power_of_two
        ctx.weight_dtypes = [weight.dtype for weight in weights]
        return tuple(
            gemm_fp8_nt(*by_row, weight.data, weight.scales, x_TD.dtype) for weight in fp8_weights
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        n, needs_x, needs = ctx.n, ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        # read once: a recomputed block returns each saved tensor only once
        saved = ctx.saved_tensors
        grad_x, grad_weights = None, []
        for i, grad_TN in enumerate(grads):
            by_row, by_column = _forms(grad_TN, ctx.power_of_two, needs_x, needs[i])
            if by_row is not None:
                transposed, scales = saved[2 * i : 2 * i + 2]
                part = gemm_fp8_nn(*by_row, transposed, scales, grad_TN.dtype)
                grad_x = part if grad_x is None else grad_x + part
            grad_weight = None
            if by_column is not None:
                x_by_column = Quantized(*saved[2 * n :])
                grad_weight = gemm_fp8_tn(*by_column, *x_by_column, ctx.weight_dtypes[i])
            grad_weights.append(grad_weight)
        rest = len(ctx.needs_input_grad) - 4 - n
        return grad_x, None, None, None, *grad_weights, *[None] * rest


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_ND: Tensor, weight: Fp8Weight, power_of_two: bool
    ) -> Tensor:
        w_ND = dequantize_128x128(weight.data, weight.scales)
        x_columns_TD = dequantize_128x1(*quantize_128x1_reference(x_TD, power_of_two))
        ctx.save_for_backward(w_ND, x_columns_TD)
        ctx.power_of_two, ctx.weight_dtype = power_of_two, weight_ND.dtype
        x_rows_TD = dequantize_1x128(*quantize_1x128_reference(x_TD, power_of_two))
        return (x_rows_TD @ w_ND.T).to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor, Tensor, None, None]:
        w_ND, x_columns_TD = ctx.saved_tensors
        rows_TN = dequantize_1x128(*quantize_1x128_reference(grad_TN, ctx.power_of_two))
        columns_TN = dequantize_128x1(*quantize_128x1_reference(grad_TN, ctx.power_of_two))
        grad_x, grad_weight = rows_TN @ w_ND, columns_TN.T @ x_columns_TD
        return grad_x.to(grad_TN.dtype), grad_weight.to(ctx.weight_dtype), None, None
