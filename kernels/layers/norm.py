"""RMSNorm (arXiv:1910.07467): `x / rms(x) * weight` over the last dimension.

Statistics are fp32, and the weight is applied before the only rounding to x's dtype. Kept for
backward: x, which is kept anyway, and the inverse root mean square, 4 bytes per row.

The gradient of the weight sums over all rows: every program adds up its rows in a fixed order, and
a second sum adds the programs. There are no atomics, so two runs produce the same bits. On a CPU
`F.rms_norm` is the fastest forward form, and `kernels.layers.norm_cpu` has its gradients.

The output is not quantized here if it is an operand of FP8 products: the gradient of their weights
needs it per 128 rows, from unrounded values, so it would be written in bf16 anyway.

Shapes: D width; the other dimensions are free.
"""

from typing import Any

import torch
from torch import Tensor

from kernels import device
from kernels.layers.norm_cpu import rms_norm_cpu


def rms_norm(x: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """`x / rms(x) * weight`, in x's shape and dtype. Differentiable in both.

    x: `[..., D]`; rows may be strided (a split of a wider tensor). weight_D: None for 1.
    """
    if x.device.type == "cpu" and not device.on_accelerator(x):
        return rms_norm_cpu(x, weight_D, eps)
    y: Tensor = _rms_norm(x, weight_D, eps)[0]
    return y


def rms_norm_reference(x: Tensor, weight_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Plain-torch form of `rms_norm`, and the inverse root mean square of every row."""
    rstd = (x.float().square().mean(-1) + eps).rsqrt()
    y = x.float() * rstd[..., None]
    return (y if weight_D is None else y * weight_D.float()).to(x.dtype), rstd


def rms_norm_backward_reference(
    grad: Tensor, x: Tensor, weight_D: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Plain-torch form of the gradients for x and weight; the second is empty without weight."""
    normed, outer = x.float() * rstd[..., None], grad.float()
    grad_weight = grad.new_empty(0)
    if weight_D is not None:
        grad_weight = (outer * normed).flatten(0, -2).sum(0).to(weight_D.dtype)
        outer = outer * weight_D.float()
    inner = (outer * normed).mean(-1, keepdim=True)
    return ((outer - normed * inner) * rstd[..., None]).to(x.dtype), grad_weight


@torch.library.custom_op("phalanx::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    if device.on_accelerator(x):
        from kernels.layers.norm_triton import forward

        with device.launching_on(x):
            return forward(x, weight_D, eps)
    return rms_norm_reference(x.contiguous(), weight_D, eps)


@_rms_norm.register_fake
def _(x: Tensor, weight_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("phalanx::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight_D: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """The second result is empty without a weight: an operator cannot return None."""
    if device.on_accelerator(x):
        from kernels.layers.norm_triton import backward

        with device.launching_on(x):
            return backward(grad, x, weight_D, rstd)
    return rms_norm_backward_reference(grad.contiguous(), x.contiguous(), weight_D, rstd)


@_rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight_D: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    nothing = grad.new_empty(0)
    return x.new_empty(x.shape), nothing if weight_D is None else torch.empty_like(weight_D)


def _save(
    ctx: Any, inputs: tuple[Tensor, Tensor | None, float], output: tuple[Tensor, Tensor]
) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None]:
    x, weight_D, rstd = ctx.saved_tensors
    grad_x, grad_weight = _rms_norm_backward(grad, x, weight_D, rstd)
    return grad_x, None if weight_D is None else grad_weight, None


_rms_norm.register_autograd(_gradients, setup_context=_save)
