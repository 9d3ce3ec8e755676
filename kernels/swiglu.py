"""SwiGLU with the routing weight folded in: `h = silu(gate) * up * weight`.

Why fused: between the two expert projections lie only element-wise operations; one pass reads
gate and up once and writes h once. Backward saves gate and up (the projection's output) and
recomputes silu, so nothing else is kept. Arithmetic is fp32, storage the operands' dtype.
The routing weight may enter here, before the down projection, because that projection is linear:
`w * (W2 @ h) = W2 @ (w * h)`; combining the rows is then a plain sum.

SwiGLU: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202. F hidden width, R rows.
"""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import device


def swiglu(gate_up_R2F: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """`h_RF`; gate is the first half of the last dimension, up the second.

    weights_R: fp32 factor per row, or None for 1. Differentiable in both.
    """
    h_RF: Tensor = _swiglu(gate_up_R2F, weights_R)
    return h_RF


def clamped_swiglu(gate_up_R2F: Tensor, weights_R: Tensor) -> Tensor:
    """GPT-OSS's activation: `h = (up + 1) * gate * sigmoid(1.702 gate) * weight`, with the gate at
    most 7 and up within +-7; fp32 inside. Differentiable in both."""
    gate, up = gate_up_R2F.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    h_RF = (up + 1) * gate * torch.sigmoid(1.702 * gate) * weights_R[:, None]
    return h_RF.to(gate_up_R2F.dtype)


def swiglu_reference(gate_up_R2F: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """Plain-torch form of `swiglu`."""
    gate, up = gate_up_R2F.float().chunk(2, dim=-1)
    h_RF = F.silu(gate).mul_(up)
    if weights_R is not None:
        h_RF.mul_(weights_R[:, None])
    return h_RF.to(gate_up_R2F.dtype)


def swiglu_backward_reference(
    grad_RF: Tensor, gate_up_R2F: Tensor, weights_R: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `swiglu` for gate_up (its dtype) and weights (fp32).

    In place wherever a temporary has served: on a CPU fresh memory costs more than arithmetic.
    """
    gate, up = gate_up_R2F.float().chunk(2, dim=-1)
    grad = grad_RF.to(torch.float32, copy=True)
    grad_up = F.silu(gate).mul_(grad)
    grad_weights = None
    if weights_R is not None:
        grad_weights = torch.linalg.vecdot(grad_up, up)
        grad_up.mul_(weights_R[:, None])
        grad.mul_(weights_R[:, None])
    grad_gate_up = torch.empty_like(gate_up_R2F)
    grad_gate, _ = grad_gate_up.chunk(2, dim=-1)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad.mul_(up), gate))
    grad_gate_up[:, grad_gate.shape[1] :] = grad_up
    return grad_gate_up, grad_weights


@torch.library.custom_op("phalanx::swiglu", mutates_args=())
def _swiglu(gate_up_R2F: Tensor, weights_R: Tensor | None) -> Tensor:
    if device.on_accelerator(gate_up_R2F):
        from kernels.swiglu_triton import swiglu_forward

        with device.launching_on(gate_up_R2F):
            return swiglu_forward(gate_up_R2F, weights_R)
    return swiglu_reference(gate_up_R2F, weights_R)


@_swiglu.register_fake
def _(gate_up_R2F: Tensor, weights_R: Tensor | None) -> Tensor:
    return gate_up_R2F.new_empty(len(gate_up_R2F), gate_up_R2F.shape[1] // 2)


@torch.library.custom_op("phalanx::swiglu_backward", mutates_args=())
def _swiglu_backward(
    grad_RF: Tensor, gate_up_R2F: Tensor, weights_R: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The second is empty where there are no weights: an operation cannot return None."""
    backward = swiglu_backward_reference
    with contextlib.ExitStack() as stack:
        if device.on_accelerator(grad_RF):
            from kernels.swiglu_triton import swiglu_backward as backward

            stack.enter_context(device.launching_on(grad_RF))
        grad_gate_up, grad_weights = backward(grad_RF, gate_up_R2F, weights_R)
    return grad_gate_up, grad_RF.new_empty(0) if grad_weights is None else grad_weights


@_swiglu_backward.register_fake
def _(grad_RF: Tensor, gate_up_R2F: Tensor, weights_R: Tensor | None) -> tuple[Tensor, Tensor]:
    nothing = grad_RF.new_empty(0)
    return (
        torch.empty_like(gate_up_R2F),
        nothing if weights_R is None else torch.empty_like(weights_R),
    )


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor | None]:
    gate_up_R2F, weights_R = ctx.saved_tensors
    grad_gate_up, grad_weights = _swiglu_backward(grad_RF, gate_up_R2F, weights_R)
    return grad_gate_up, None if weights_R is None else grad_weights


_swiglu.register_autograd(_gradients, setup_context=_save)
