"""Rotation of heads by position-dependent angles (RoPE, arXiv:2104.09864), from tables.

Dimension i of a head is paired with i + C/2, or with its neighbor if `interleaved`; the arithmetic
is fp32 for every dtype of x. Backward is the rotation by the negative angle, so only the tables are
kept. x may be part of a wider tensor, such as the rotated part of MLA's queries and keys
(arXiv:2405.04434, section 2.1.3): its heads are read in place.

T tokens, H heads, C width of the rotated part.
"""

from typing import Any

import torch
from torch import Tensor

from kernels import device

_PIECE = 2**17
"""Elements of x that are rotated together on a CPU."""


def rotate(
    x_THC: Tensor, cos_Tc: Tensor, sin_Tc: Tensor, interleaved: bool, inverse: bool = False
) -> Tensor:
    """Every pair rotated by its angle (back, if `inverse`); contiguous, in x's shape and dtype.

    cos_Tc, sin_Tc: fp32 `[T, C / 2]`. Differentiable in x alone.
    """
    if not (torch.is_grad_enabled() or device.on_accelerator(x_THC)):
        # for one token at a time on a CPU, calling an operator takes as long as its work
        return rotate_reference(x_THC, cos_Tc, sin_Tc, interleaved, inverse)
    rotated_THC: Tensor = _rotate(x_THC, cos_Tc, sin_Tc, interleaved, inverse)
    return rotated_THC


def rotate_reference(
    x_THC: Tensor, cos_Tc: Tensor, sin_Tc: Tensor, interleaved: bool, inverse: bool = False
) -> Tensor:
    """Plain-torch form of `rotate`: some tokens at a time, whose fp32 temporaries stay in cache."""
    out_THC = torch.empty(x_THC.shape, dtype=x_THC.dtype, device=x_THC.device)
    tensors = x_THC, cos_Tc, -sin_Tc if inverse else sin_Tc, out_THC
    step = max(_PIECE // max(x_THC.shape[1] * x_THC.shape[2], 1), 1)
    for parts in zip(*(tensor.split(step) for tensor in tensors), strict=True):
        _rotate_piece(parts, interleaved)
    return out_THC


def _rotate_piece(parts: tuple[Tensor, ...], interleaved: bool) -> None:
    """parts: x, its cosines and sines, and the result, of some tokens."""
    x_THC, cos_Tc, sin_Tc, out_THC = parts
    cos, sin, x = cos_Tc[:, None], sin_Tc[:, None], x_THC.float()
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
        out_first, out_second = out_THC[..., 0::2], out_THC[..., 1::2]
    else:
        first, second = x.chunk(2, dim=-1)
        out_first, out_second = out_THC.chunk(2, dim=-1)
    # few temporaries: on a CPU allocating memory costs more than arithmetic
    out_first.copy_((first * cos).addcmul_(second, sin, value=-1))
    out_second.copy_((second * cos).addcmul_(first, sin))


@torch.library.custom_op("phalanx::rotate", mutates_args=())
def _rotate(
    x_THC: Tensor, cos_Tc: Tensor, sin_Tc: Tensor, interleaved: bool, inverse: bool
) -> Tensor:
    if device.on_accelerator(x_THC):
        from kernels.layers.rope_triton import rotate as launch

        with device.launching_on(x_THC):
            return launch(x_THC, cos_Tc, sin_Tc, interleaved, inverse)
    return rotate_reference(x_THC, cos_Tc, sin_Tc, interleaved, inverse)


@_rotate.register_fake
def _(x_THC: Tensor, cos_Tc: Tensor, sin_Tc: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    return x_THC.new_empty(x_THC.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool, bool], output: Tensor) -> None:
    _, cos_Tc, sin_Tc, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos_Tc, sin_Tc)


def _gradient(ctx: Any, grad_THC: Tensor) -> tuple[Tensor, None, None, None, None]:
    grad = _rotate(grad_THC, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
    return grad, None, None, None, None


_rotate.register_autograd(_gradient, setup_context=_save)
