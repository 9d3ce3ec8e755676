"""SwiGLU with the routing weight folded in: `h = silu(gate) * up * weight`.

Why fused: between the two expert projections lie only element-wise operations; one pass reads
gate and up once and writes h once. Backward saves gate and up (the projection's output) and
recomputes silu, so nothing else is kept. Arithmetic is fp32, storage the operands' dtype.
The routing weight may enter here, before the down projection, because that projection is linear:
`w * (W2 @ h) = W2 @ (w * h)`; combining the rows is then a plain sum.

SwiGLU: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202. F hidden width, R rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up_R2F: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """`h_RF`; gate is the first half of the last dimension, up the second.

    weights_R: fp32 factor per row, or None for 1. Differentiable in both.
    """
    return _SwiGlu.apply(gate_up_R2F, weights_R)


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


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_R2F: Tensor, weights_R: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up_R2F, weights_R)
        if gate_up_R2F.device.type == "meta":  # what the Triton kernel allocates
            return gate_up_R2F.new_empty(len(gate_up_R2F), gate_up_R2F.shape[1] // 2)
        if gate_up_R2F.is_cuda:
            from kernels.swiglu_triton import swiglu_forward

            with torch.cuda.device(gate_up_R2F.device):  # Triton launches on the current device
                return swiglu_forward(gate_up_R2F, weights_R)
        return swiglu_reference(gate_up_R2F, weights_R)

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up_R2F, weights_R = ctx.saved_tensors
        if grad_RF.device.type == "meta":
            grad_weights = None if weights_R is None else torch.empty_like(weights_R)
            return torch.empty_like(gate_up_R2F), grad_weights
        if grad_RF.is_cuda:
            from kernels.swiglu_triton import swiglu_backward

            with torch.cuda.device(grad_RF.device):
                return swiglu_backward(grad_RF.contiguous(), gate_up_R2F, weights_R)
        return swiglu_backward_reference(grad_RF, gate_up_R2F, weights_R)
