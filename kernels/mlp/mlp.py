"""SwiGLU experts in bf16 or fp32 with less activation memory: backward recomputes h.

As two products and an activation, the experts keep x, gate and up, and h: 2 (D + 3 F) bytes per
row in bf16. h follows from gate and up, which SwiGLU's backward reads anyway and from which it
computes h in the same pass: so x, gate and up are enough, 2 (D + 2 F) bytes, without an extra
product (as in SonicMoE, arXiv:2512.14080).

R rows, D model width, F expert width, E experts.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.grouped_gemm.grouped_gemm import grouped_gemm_nn, grouped_gemm_nt, grouped_gemm_tn
from kernels.mlp.swiglu import Activation, swiglu, swiglu_backward


def swiglu_mlp(
    x_RD: Tensor, w13: Tensor, w2_EDF: Tensor, ends_E: Tensor, counts_E: Tensor, weights_R: Tensor,
    activation: Activation = "swiglu",
) -> Tensor:  # fmt: skip
    """`y_RD = (silu(x w1.T) * (x w3.T) * weight) w2.T` for the rows of every expert.

    w13: `[E, 2F, D]`. Groups as in `kernels.grouped_gemm.grouped_gemm`. Differentiable in x, w13,
    w2, weights_R.
    """
    y_RD: Tensor = _Mlp.apply(x_RD, w13, w2_EDF, ends_E, counts_E, weights_R, activation)
    return y_RD


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, w13: Tensor, w2: Tensor, ends_E: Tensor, counts_E: Tensor,
        weights_R: Tensor, activation: Activation,
    ) -> Tensor:  # fmt: skip
        gate_up = grouped_gemm_nt(x_RD, w13, ends_E, counts_E)
        ctx.save_for_backward(x_RD, w13, w2, ends_E, counts_E, weights_R, gate_up)
        ctx.activation = activation
        return grouped_gemm_nt(swiglu(gate_up, weights_R, activation), w2, ends_E, counts_E)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, w13, w2, ends_E, counts_E, weights_R, gate_up = ctx.saved_tensors
        needs_x, needs_w13, needs_w2 = ctx.needs_input_grad[:3]
        grad_RD = grad_RD.contiguous()
        grad_h = grouped_gemm_nn(grad_RD, w2, ends_E, counts_E)
        grad_gate_up, grad_weights, h = swiglu_backward(
            grad_h, gate_up, weights_R, ctx.activation, with_h=needs_w2
        )
        del grad_h, gate_up
        grad_w2 = grad_w13 = grad_x = None
        if needs_w2:
            grad_w2 = grouped_gemm_tn(grad_RD, h, ends_E, counts_E)
        del h
        if needs_w13:
            grad_w13 = grouped_gemm_tn(grad_gate_up, x_RD, ends_E, counts_E)
        if needs_x:
            grad_x = grouped_gemm_nn(grad_gate_up, w13, ends_E, counts_E)
        return grad_x, grad_w13, grad_w2, None, None, grad_weights, None
