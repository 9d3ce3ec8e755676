"""FP8 arithmetic that differs from the recipe `fp8_blockwise`, emulated: operands are rounded to
FP8 and multiplied in a wider type, which represents them exactly. Ablations train with it
(`scripts.fp8_convergence.ablations`); no setting enables it.

| variant | difference |
|---|---|
| blockwise | none: the recipe itself through this emulation, as a check |
| per_tensor | one scale per tensor (activations and gradients: of all rows; weights: per matrix) |
| e5m2_gradients | gradients in e5m2: 2 bits of mantissa for 5 of exponent |
| narrow_accumulator | sums are kept in 14 bits over the whole of K |

The narrow accumulator is that of Hopper's tensor cores as DeepSeek-V3 measured it
(arXiv:2412.19437, section 3.5.2): about 14 bits of a sum are kept after each instruction, which
processes 32 products. Here 32 products are summed and added in fp32, then the sum is cut to 14
significant bits, toward zero. The hardware also cuts every product as it is aligned to the largest,
so this emulation loses less. The recipe moves sums to fp32 every 128 products; here that never
happens, and scales are multiplied into the operands, which is necessary if no sum ends before K.

All scales are powers of two, which a CPU's bf16 products represent exactly; so they must be
compared with the recipe with `precision.fp8.power_of_two`. Only for one rank, from whose fp32
masters the weights are read.

M x N output, K summed; T tokens or rows, D, F widths, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fp8 import Quantized
from kernels.gemm.linear_fp8 import Fp8Weight
from kernels.grouped_gemm.grouped_gemm import true_rows
from kernels.mlp.mlp_fp8 import Groups
from kernels.mlp.swiglu import Activation, swiglu, swiglu_backward
from kernels.quantization.quantize import (
    block_scales,
    dequantize_1x128,
    dequantize_128x1,
    dequantize_128x128,
    quantize_1x128,
    quantize_128x1,
    quantize_128x128,
)
from models.layers.linear import Fp8Module, as_matrices

INSTRUCTION = 32
"""FP8 products that one instruction of a tensor core sums."""
KEPT_BITS = 14
"""Significant bits of a sum that an instruction keeps."""

Quantise = Callable[[Tensor, int, Tensor], Tensor]
"""Returns rounded values of a part, in the operand's dtype: (part, summed dimension, whole
tensor)"""


@dataclass(frozen=True)
class Arithmetic:
    """How a variant rounds operands and computes products."""

    activation: Quantise
    weight: Callable[[Tensor], Tensor]
    gradient: Quantise
    product: Callable[[Tensor, Tensor], Tensor] = torch.mm


def blocks(x: Tensor, dim: int, whole: Tensor) -> Tensor:
    """A scale per 128 values along `dim`, in e4m3."""
    if dim == 1:
        return dequantize_1x128(*quantize_1x128(x, True), x.dtype)
    return dequantize_128x1(*quantize_128x1(x, True), x.dtype)


def weight_blocks(w_ND: Tensor) -> Tensor:
    """A scale per 128x128, in e4m3."""
    quantized, _ = quantize_128x128(w_ND, True)
    return dequantize_128x128(*quantized, w_ND.dtype)


def one_scale(x: Tensor, dim: int, whole: Tensor) -> Tensor:
    """The scale of the whole tensor, in e4m3."""
    return _scaled(x, whole.float().abs().amax(), torch.float8_e4m3fn)


def e5m2_blocks(x: Tensor, dim: int, whole: Tensor) -> Tensor:
    """A scale per 128 values along `dim`, in e5m2."""
    along = x if dim == 1 else x.T
    padded = F.pad(along.float(), (0, -along.shape[1] % 128))
    blocked = padded.unflatten(1, (-1, 128))
    values = _scaled(blocked, blocked.abs().amax(2, keepdim=True), torch.float8_e5m2)
    values = values.flatten(1)[:, : along.shape[1]].to(x.dtype)
    return values if dim == 1 else values.T


def _scaled(x: Tensor, largest: Tensor, fp8: torch.dtype) -> Tensor:
    scale = block_scales(largest, fp8, power_of_two=True)
    return ((x.float() / scale).to(fp8).float() * scale).to(x.dtype)


def narrow_product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """`a @ b` in fp32, its sums cut to 14 bits after every instruction."""
    total = torch.zeros(a_MK.shape[0], b_KN.shape[1], device=a_MK.device)
    a, b, mask = a_MK.float(), b_KN.float(), -(1 << (24 - KEPT_BITS))
    for k in range(0, a.shape[1], INSTRUCTION):
        total.addmm_(a[:, k : k + INSTRUCTION], b[k : k + INSTRUCTION])
        total.view(torch.int32).bitwise_and_(mask)
    return total


BLOCKWISE = Arithmetic(blocks, weight_blocks, blocks)
VARIANTS = {
    "blockwise": BLOCKWISE,
    "per_tensor": Arithmetic(one_scale, lambda w: one_scale(w, 1, w), one_scale),
    "e5m2_gradients": Arithmetic(blocks, weight_blocks, e5m2_blocks),
    "narrow_accumulator": Arithmetic(blocks, weight_blocks, blocks, narrow_product),
}


@contextmanager
def emulated(arithmetic: Arithmetic) -> Iterator[None]:
    """Context in which modules in FP8 compute with this arithmetic."""

    def fp8_weight(module: Fp8Module, name: str) -> Fp8Weight:
        source = module.sources.get(name)
        master = getattr(module, name) if source is None else source.local  # type: ignore[attr-defined]
        w = as_matrices(name, master.detach()).float()
        rounded = (
            torch.stack([*map(arithmetic.weight, w)]) if w.dim() == 3 else arithmetic.weight(w)
        )
        return Fp8Weight(rounded, rounded, torch.ones(()))

    def linears(
        x_TD: Tensor, weights: Sequence[Tensor], fp8_weights: Sequence[Fp8Weight],
        power_of_two: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        flat = x_TD.reshape(-1, x_TD.shape[-1])
        products = _Products(arithmetic, None, len(flat))
        outputs = [
            _Linear.apply(flat, weight, fp8.data, products)
            for weight, fp8 in zip(weights, fp8_weights, strict=True)
        ]
        return tuple(y.view(*x_TD.shape[:-1], y.shape[1]) for y in outputs)

    def grouped(
        x_RK: Tensor, weight: Tensor, fp8: Fp8Weight, groups: Groups, power_of_two: bool
    ) -> Tensor:
        y_RN: Tensor = _Linear.apply(
            x_RK, weight, fp8.data, _Products(arithmetic, groups, len(x_RK))
        )
        return y_RN

    def mlp(
        x_RD: Tensor, w13: Tensor, w2: Tensor, fp8_w13: Fp8Weight, fp8_w2: Fp8Weight, *,
        weights_R: Tensor | None = None, groups: Groups | None = None,
        rows: Quantized | None = None, activation: Activation = "swiglu",
        power_of_two: bool = False,
    ) -> Tensor:  # fmt: skip
        assert rows is None, "rows that travel in FP8 are blockwise already"
        products = _Products(arithmetic, groups, len(x_RD))
        y_RD: Tensor = _Mlp.apply(
            x_RD, w13, w2, fp8_w13.data, fp8_w2.data, weights_R, activation, products
        )
        return y_RD

    with ExitStack() as stack:
        stack.enter_context(patch.object(Fp8Module, "fp8_weight", fp8_weight))
        stack.enter_context(patch("models.layers.linear.linears_fp8", linears))
        stack.enter_context(patch("models.fp8.grouped_linear_fp8", grouped))
        stack.enter_context(patch("models.fp8.swiglu_mlp_fp8", mlp))
        yield


class _Products:
    """The three products of rows in groups, or of all rows with one weight."""

    def __init__(self, arithmetic: Arithmetic, groups: Groups | None, n_rows: int) -> None:
        self.arithmetic = arithmetic
        self.parts = [slice(0, n_rows)]
        if groups is not None:
            self.parts = true_rows(groups.ends_E, groups.counts_E)

    def nt(self, x: Tensor, w: Tensor) -> Tensor:
        """`x @ w.T`"""
        return self._by_rows(x, w.mT, self.arithmetic.activation)

    def nn(self, dy: Tensor, w: Tensor) -> Tensor:
        """`dy @ w`"""
        return self._by_rows(dy, w, self.arithmetic.gradient)

    def tn(self, dy: Tensor, x: Tensor, like: Tensor) -> Tensor:
        """`dy.T @ x`, of the shape and dtype of a weight."""
        made = [
            self._multiply(
                self.arithmetic.gradient(dy[part], 0, dy).T,
                self.arithmetic.activation(x[part], 0, x),
            )
            for part in self.parts
        ]
        return torch.stack(made).view(like.shape).to(like.dtype)

    def _by_rows(self, x: Tensor, w: Tensor, quantize: Quantise) -> Tensor:
        y = x.new_zeros(len(x), w.shape[-1])
        for part, matrix in zip(self.parts, w if w.dim() == 3 else w[None], strict=True):
            y[part] = self._multiply(quantize(x[part], 1, x), matrix)
        return y

    def _multiply(self, a: Tensor, b: Tensor) -> Tensor:
        if not len(a) or not a.shape[1]:
            return a.new_zeros(len(a), b.shape[1])
        return self.arithmetic.product(a, b.to(a.dtype))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rounded: Tensor, products: _Products
    ) -> Tensor:
        ctx.save_for_backward(x, rounded)
        ctx.products, ctx.like = products, weight
        return products.nt(x, rounded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rounded = ctx.saved_tensors
        dx, dw = ctx.products.nn(grad, rounded), ctx.products.tn(grad, x, ctx.like)
        return dx, dw, None, None


class _Mlp(torch.autograd.Function):
    """As in the recipe: gate and up are kept in FP8, and h is recomputed from them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w13: Tensor, w2: Tensor, rounded13: Tensor, rounded2: Tensor,
        weights_R: Tensor | None, activation: Activation, products: _Products,
    ) -> Tensor:  # fmt: skip
        gate_up = products.nt(x, rounded13)
        kept = products.arithmetic.activation(gate_up, 1, gate_up)
        ctx.save_for_backward(x, kept, rounded13, rounded2, weights_R)
        ctx.likes, ctx.activation, ctx.products = (w13, w2), activation, products
        return products.nt(swiglu(gate_up, weights_R, activation), rounded2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, rounded13, rounded2, weights_R = ctx.saved_tensors
        products, (like13, like2) = ctx.products, ctx.likes
        dh = products.nn(grad, rounded2)
        d_gate_up, d_weights, h = swiglu_backward(dh, kept, weights_R, ctx.activation, with_h=True)
        dw13, dw2 = products.tn(d_gate_up, x, like13), products.tn(grad, h, like2)
        dx = products.nn(d_gate_up, rounded13)
        return dx, dw13, dw2, None, None, None if weights_R is None else d_weights, None, None
