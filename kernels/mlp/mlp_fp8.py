"""A SwiGLU feed-forward whose six products run in FP8: the experts of an MoE layer, or a dense one.

| kept for backward | bytes per row | reason for this form |
|---|---|---|
| x, 128x1 | D | operand of w13's gradient, which sums over rows |
| gate and up, 1x128 | 2 F | SwiGLU and its gradient are recomputed from them |

These are all activations, in FP8 with their scales: h is not kept, since backward recomputes and
quantizes it in the same pass as the gradient of gate and up (DeepSeek-V3, arXiv:2412.19437,
section 3.3.3). A bf16 layer keeps 2 D + 6 F bytes.

Rows that a dispatcher received in FP8 are the operand of the first product as they are. They are
quantized again only for the weight gradient, whose scales run along the other dimension.

x's gradient for rows in FP8 is that of the values before their quantization (straight through).

R rows, D model width, F hidden width, E groups of rows (experts).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.fp8 import Quantized
from kernels.gemm.gemm_fp8 import gemm_fp8_nn, gemm_fp8_nt, gemm_fp8_tn
from kernels.gemm.linear_fp8 import Fp8Weight
from kernels.grouped_gemm.grouped_gemm_fp8 import (
    grouped_gemm_fp8_nn,
    grouped_gemm_fp8_nt,
    grouped_gemm_fp8_tn,
)
from kernels.mlp.swiglu import Activation, swiglu_backward_quantized, swiglu_quantized
from kernels.quantization.quantize import (
    dequantize_1x128,
    quantize_1x128,
    quantize_1x128_128x1,
    quantize_1x128_128x1_grouped,
    quantize_128x1,
    quantize_128x1_grouped,
)


@dataclass(frozen=True)
class Groups:
    """The rows of each expert, as in `kernels.grouped_gemm.grouped_gemm`."""

    ends_E: Tensor
    counts_E: Tensor
    align: int = 1
    """The caller guarantees that every group starts at a multiple of this."""


def swiglu_mlp_fp8(
    x_RD: Tensor, w13: Tensor, w2: Tensor, fp8_w13: Fp8Weight, fp8_w2: Fp8Weight, *,
    weights_R: Tensor | None = None, groups: Groups | None = None, rows: Quantized | None = None,
    activation: Activation = "swiglu", power_of_two: bool = False,
) -> Tensor:  # fmt: skip
    """`y_RD = (silu(x w1.T) * (x w3.T) * weight) w2.T`, in x's dtype, row by row.

    Differentiable in x, w13, w2 and weights_R.

    Args:
        x_RD: bf16 or fp32.
        w13, w2: `[2F, D]` and `[D, F]`, with groups `[E, ...]`: they receive the gradients.
        fp8_w13, fp8_w2: Their quantized forms, which the products use.
        weights_R: Factor per row of h.
        groups: The rows of each expert; None for a dense layer.
        rows: x in FP8, 1x128, if it already is; x then only defines the dtype and receives the
            gradient.
        activation: The activation function.
        power_of_two: Round all scales up to powers of two.
    """
    wants_weights = torch.is_grad_enabled() and (w13.requires_grad or w2.requires_grad)
    wants_rows = torch.is_grad_enabled() and any(
        leaf is not None and leaf.requires_grad for leaf in (x_RD, weights_R)
    )
    y_RD: Tensor = _Mlp.apply(
        x_RD, w13, w2, weights_R, fp8_w13, fp8_w2, groups, rows, activation, power_of_two,
        wants_weights, wants_weights or wants_rows,
    )  # fmt: skip
    return y_RD


def grouped_linear_fp8(
    x_RK: Tensor, weight_ENK: Tensor, fp8_weight: Fp8Weight, groups: Groups,
    power_of_two: bool = False,
) -> Tensor:  # fmt: skip
    """`y[r] = x[r] @ weight[e].T` in x's dtype for the rows of group e, with all three products in
    FP8. Differentiable in x and weight."""
    keep_x = torch.is_grad_enabled() and weight_ENK.requires_grad
    y_RN: Tensor = _GroupedLinear.apply(x_RK, weight_ENK, fp8_weight, groups, power_of_two, keep_x)
    return y_RN


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, w13: Tensor, w2: Tensor, weights_R: Tensor | None,
        fp8_w13: Fp8Weight, fp8_w2: Fp8Weight, groups: Groups | None, rows: Quantized | None,
        activation: Activation, power_of_two: bool, wants_weights: bool, wants_any: bool,
    ) -> Tensor:  # fmt: skip
        products = _Products(groups, power_of_two, x_RD.dtype)
        columns = None
        if rows is not None:
            if wants_weights:
                columns = products.columns(dequantize_1x128(*rows, x_RD.dtype))
        elif wants_weights:
            rows, columns = products.both(x_RD)
        else:
            rows = quantize_1x128(x_RD, power_of_two)
        gate_up = products.nt(rows, fp8_w13)
        h = swiglu_quantized(gate_up, weights_R, activation, power_of_two)
        kept = quantize_1x128(gate_up, power_of_two) if wants_any else (None, None)
        del rows, gate_up  # before the output is allocated
        y_RD = products.nt(h, fp8_w2)
        ctx.save_for_backward(weights_R, *kept, *fp8_w13, *fp8_w2, *(columns or ()))
        ctx.products, ctx.activation, ctx.power_of_two = products, activation, power_of_two
        ctx.weight_dtype = w13.dtype
        return y_RD

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        weights_R, gate_up, gate_up_scales, *rest = ctx.saved_tensors
        fp8_w13, fp8_w2 = Fp8Weight(*rest[:3]), Fp8Weight(*rest[3:6])
        products, dtype = ctx.products, ctx.weight_dtype
        needs_x, needs_w13, needs_w2 = ctx.needs_input_grad[:3]
        if needs_w13 or needs_w2:
            grad_rows, grad_columns = products.both(grad_RD)
        else:
            grad_rows, grad_columns = quantize_1x128(grad_RD, ctx.power_of_two), None
        grad_h = products.nn(grad_rows, fp8_w2)
        del grad_rows  # here and below: before a tensor of its size is allocated
        groups = products.groups
        gate_up_rows, gate_up_columns, h_columns, grad_weights_R = swiglu_backward_quantized(
            grad_h, gate_up, weights_R, ctx.activation, ctx.power_of_two,
            None if groups is None else groups.ends_E, None if groups is None else groups.counts_E,
            gate_up_scales,
        )  # fmt: skip
        del grad_h
        grad_x = grad_w13 = grad_w2 = None
        if needs_w2:
            assert grad_columns is not None
            grad_w2 = products.tn(grad_columns, h_columns, dtype)
        del grad_columns, h_columns
        if needs_w13:
            grad_w13 = products.tn(gate_up_columns, Quantized(*rest[6:]), dtype)
        del gate_up_columns
        if needs_x:
            grad_x = products.nn(gate_up_rows, fp8_w13)
        grad_weights = None if weights_R is None else grad_weights_R
        return grad_x, grad_w13, grad_w2, grad_weights, *[None] * 8


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RK: Tensor, weight_ENK: Tensor, fp8_weight: Fp8Weight, groups: Groups,
        power_of_two: bool, keep_x: bool,
    ) -> Tensor:  # fmt: skip
        products = _Products(groups, power_of_two, x_RK.dtype)
        rows, columns = products.both(x_RK) if keep_x else (quantize_1x128(x_RK, power_of_two), ())
        ctx.save_for_backward(*fp8_weight, *columns)
        ctx.products, ctx.weight_dtype = products, weight_ENK.dtype
        return products.nt(rows, fp8_weight)

    @staticmethod
    def backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor | None, ...]:
        products, saved = ctx.products, ctx.saved_tensors
        rows, columns = products.both(grad_RN)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = products.nn(rows, Fp8Weight(*saved[:3]))
        if ctx.needs_input_grad[1]:
            x = Quantized(*saved[3:])
            grad_weight = products.tn(columns, x, ctx.weight_dtype)
        return grad_x, grad_weight, *[None] * 4


@dataclass(frozen=True)
class _Products:
    """The three products and the quantizers they need, for grouped or ungrouped rows."""

    groups: Groups | None
    power_of_two: bool
    dtype: torch.dtype
    """Dtype of activations and their gradients."""

    def both(self, x: Tensor) -> tuple[Quantized, Quantized]:
        """1x128 and 128x1, in one pass."""
        if self.groups is None:
            return quantize_1x128_128x1(x, self.power_of_two)
        ends, counts = self.groups.ends_E, self.groups.counts_E
        return quantize_1x128_128x1_grouped(x, ends, counts, self.power_of_two)

    def columns(self, x: Tensor) -> Quantized:
        """128x1."""
        if self.groups is None:
            return quantize_128x1(x, self.power_of_two)
        ends, counts = self.groups.ends_E, self.groups.counts_E
        return quantize_128x1_grouped(x, ends, counts, self.power_of_two)

    def nt(self, x: Quantized, w: Fp8Weight) -> Tensor:
        """`x @ w.T`."""
        if self.groups is None:
            return gemm_fp8_nt(*x, w.data, w.scales, self.dtype)
        ends, counts = self.groups.ends_E, self.groups.counts_E
        return grouped_gemm_fp8_nt(*x, w.data, w.scales, ends, counts, self.dtype)

    def nn(self, dy: Quantized, w: Fp8Weight) -> Tensor:
        """`dy @ w`."""
        if self.groups is None:
            return gemm_fp8_nn(*dy, w.transposed, w.scales, self.dtype)
        ends, counts = self.groups.ends_E, self.groups.counts_E
        return grouped_gemm_fp8_nn(*dy, w.transposed, w.scales, ends, counts, self.dtype)

    def tn(self, dy: Quantized, x: Quantized, dtype: torch.dtype) -> Tensor:
        """`dy.T @ x`, per group."""
        if self.groups is None:
            return gemm_fp8_tn(*dy, *x, dtype)
        ends, counts, align = self.groups.ends_E, self.groups.counts_E, self.groups.align
        return grouped_gemm_fp8_tn(*dy, *x, ends, counts, dtype, align=align)
