"""What torch's fused kernels for CUDA keep and allocate, for shadows on the meta device.

For that device torch itself has compositions of small operations, which keep more. Attention with
a mask is taken to be a fused kernel as well, except where torch has none: a bias that needs a
gradient (sinks) with grouped heads; that one stores its probabilities on CUDA too.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_aten = torch.ops.aten


class FusedKernels(TorchFunctionMode):
    """Torch's fused kernels for CUDA instead of the compositions it has for the meta device."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and _is_fused(
            args[0], args[1], kwargs["attn_mask"]
        ):
            return _fused_attention(*args, **kwargs)
        return function(*args, **kwargs)


def _is_fused(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """Torch has no fused kernel for a bias with a gradient and grouped heads at once."""
    return mask is None or not mask.requires_grad or q.shape[1] == k.shape[1]


def _fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    **_: Any,
) -> Tensor:
    bias = attn_mask
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape, dtype=q.dtype, device=q.device)  # as torch does
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if bias is not None and bias.requires_grad:
        efficient = _aten._scaled_dot_product_efficient_attention
        return cast(Tensor, efficient(q, k, v, bias, True, 0.0, is_causal, scale=scale)[0])
    cudnn = _aten._scaled_dot_product_cudnn_attention
    return cast(Tensor, cudnn(q, k, v, bias, True, 0.0, is_causal, False, scale=scale)[0])
