"""A linear layer whose three products run in FP8, blockwise.

Forward quantises x twice in one pass: per 1x128 along its width for the output, per 128x1 along the
tokens for the weight gradient. Only the second form is kept for backward, at one byte per element:
half of what a bf16 layer keeps. Backward quantises dy the same way, once for each of its products.
x in bf16 is not kept, so the weight gradient is that of the quantised x (DeepSeek-V3,
arXiv:2412.19437, section 3.3).

The weight is quantised per 128x128, once for the products of forward and backward. It changes only
when the optimizer steps, so all microbatches of a step can share it: `quantized_once(model)` around
them. That keeps two bytes per weight; it is a scope, not a cache that guesses when weights change,
because FSDP2 refills a gathered weight without a trace in its version counter.

Left out: a bias (no projection of the models here that is worth FP8 has one).

Shapes: T tokens, D input width, N output width; d, n, t their numbers of blocks of 128.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels.fp8 import Quantized
from kernels.gemm_fp8 import gemm_fp8_nn, gemm_fp8_nt, gemm_fp8_tn
from kernels.quantize import (
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


@dataclass(frozen=True)
class Fp8Weight:
    """A weight `[N, D]` per 128x128, in both memory orders."""

    data_ND: Tensor
    transposed_ND: Tensor
    """The same data, column-major, for the product that sums over N."""
    scales_nd: Tensor

    @staticmethod
    def of(weight_ND: Tensor, power_of_two: bool = False) -> "Fp8Weight":
        """Quantise a weight; without autograd."""
        (data, scales), transposed = quantize_128x128(weight_ND.detach(), power_of_two)
        return Fp8Weight(data, transposed, scales)


def linear_fp8(
    x_TD: Tensor, weight_ND: Tensor, fp8_weight: Fp8Weight | None = None,
    power_of_two: bool = False, main_grad_ND: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`x @ weight.T` in x's dtype; leading dimensions of x are free. Differentiable in x, weight.

    fp8_weight: the quantised weight, where it exists already. power_of_two: of all scales.
    main_grad_ND: fp32; the weight's gradient is added to it, and autograd gets none.
    """
    if x_TD.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"linear_fp8 takes bf16 or fp32, got {x_TD.dtype}")
    fp8_weight = fp8_weight or Fp8Weight.of(weight_ND, power_of_two)
    flat = x_TD.reshape(-1, x_TD.shape[-1])
    keep_x = torch.is_grad_enabled() and weight_ND.requires_grad
    quantized = fp8_weight.data_ND, fp8_weight.transposed_ND, fp8_weight.scales_nd
    y: Tensor = _LinearFp8.apply(flat, weight_ND, *quantized, power_of_two, main_grad_ND, keep_x)
    return y.view(*x_TD.shape[:-1], weight_ND.shape[0])


def linear_fp8_reference(
    x_TD: Tensor, weight_ND: Tensor, fp8_weight: Fp8Weight | None = None,
    power_of_two: bool = False, main_grad_ND: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Plain-torch form of `linear_fp8`: dequantised operands, fp32 products."""
    fp8_weight = fp8_weight or Fp8Weight.of(weight_ND, power_of_two)
    flat = x_TD.reshape(-1, x_TD.shape[-1])
    y: Tensor = _Reference.apply(flat, weight_ND, fp8_weight, power_of_two, main_grad_ND)
    return y.view(*x_TD.shape[:-1], weight_ND.shape[0])


class Fp8Linear(nn.Module):
    """`linear_fp8` with its weight; a drop-in for a bias-free `nn.Linear`."""

    def __init__(
        self, in_features: int, out_features: int, power_of_two: bool = False,
        device: torch.device | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, device=device, dtype=dtype)
        )
        self.power_of_two = power_of_two
        self._scope: _Scope | None = None
        if self.weight.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Linear`."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """`x @ weight.T`, in the dtype of x."""
        return linear_fp8(x, self.weight, self._quantized_weight(), self.power_of_two)

    def _quantized_weight(self) -> Fp8Weight:
        if self._scope is None:
            return Fp8Weight.of(self.weight, self.power_of_two)
        if self._scope.weight is None:
            self._scope.weight = Fp8Weight.of(self.weight, self.power_of_two)
        return self._scope.weight


@dataclass
class _Scope:
    weight: Fp8Weight | None = None


@contextmanager
def quantized_once(model: nn.Module) -> Iterator[None]:
    """Within it every `Fp8Linear` of the model quantises its weight at its first use only.

    To be put around the microbatches of one optimizer step; weights must not change within.
    """
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    for layer in layers:
        layer._scope = _Scope()
    try:
        yield
    finally:
        for layer in layers:
            layer._scope = None


def _forms(
    x: Tensor, power_of_two: bool, rows: bool, columns: bool
) -> tuple[Quantized | None, Quantized | None]:
    """The quantised forms that are needed, in one pass."""
    if rows and columns:
        return quantize_1x128_128x1(x, power_of_two)
    return (
        quantize_1x128(x, power_of_two) if rows else None,
        quantize_128x1(x, power_of_two) if columns else None,
    )


class _LinearFp8(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_ND: Tensor, data_ND: Tensor, transposed_ND: Tensor,
        scales_nd: Tensor, power_of_two: bool, main_grad_ND: Tensor | None, keep_x: bool,
    ) -> Tensor:  # fmt: skip
        by_row, by_column = _forms(x_TD, power_of_two, True, keep_x)
        assert by_row is not None
        ctx.save_for_backward(transposed_ND, scales_nd, *(by_column or ()))
        ctx.power_of_two, ctx.main_grad_ND = power_of_two, main_grad_ND
        ctx.weight_dtype = weight_ND.dtype
        return gemm_fp8_nt(*by_row, data_ND, scales_nd, x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, ...]:
        transposed_ND, scales_nd = ctx.saved_tensors[:2]
        by_row, by_column = _forms(grad_TN, ctx.power_of_two, *ctx.needs_input_grad[:2])
        grad_x = grad_weight = None
        if by_row is not None:
            grad_x = gemm_fp8_nn(*by_row, transposed_ND, scales_nd, grad_TN.dtype)
        if by_column is not None:
            x_by_column = Quantized(*ctx.saved_tensors[2:])
            if ctx.main_grad_ND is None:
                grad_weight = gemm_fp8_tn(*by_column, *x_by_column, out_dtype=ctx.weight_dtype)
            else:
                gemm_fp8_tn(*by_column, *x_by_column, accumulate_into=ctx.main_grad_ND)
        return grad_x, grad_weight, *[None] * 6


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_ND: Tensor, weight: Fp8Weight, power_of_two: bool,
        main_grad_ND: Tensor | None,
    ) -> Tensor:  # fmt: skip
        w_ND = dequantize_128x128(weight.data_ND, weight.scales_nd)
        x_columns_TD = dequantize_128x1(*quantize_128x1_reference(x_TD, power_of_two))
        ctx.save_for_backward(w_ND, x_columns_TD)
        ctx.power_of_two, ctx.main_grad_ND = power_of_two, main_grad_ND
        ctx.weight_dtype = weight_ND.dtype
        x_rows_TD = dequantize_1x128(*quantize_1x128_reference(x_TD, power_of_two))
        return (x_rows_TD @ w_ND.T).to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        w_ND, x_columns_TD = ctx.saved_tensors
        rows_TN = dequantize_1x128(*quantize_1x128_reference(grad_TN, ctx.power_of_two))
        columns_TN = dequantize_128x1(*quantize_128x1_reference(grad_TN, ctx.power_of_two))
        grad_x, grad_weight = rows_TN @ w_ND, columns_TN.T @ x_columns_TD
        if ctx.main_grad_ND is not None:
            ctx.main_grad_ND.add_(grad_weight)
            return grad_x.to(grad_TN.dtype), None, None, None, None
        return grad_x.to(grad_TN.dtype), grad_weight.to(ctx.weight_dtype), None, None, None
