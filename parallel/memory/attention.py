"""Memory of torch's fused attention for CUDA, for traced tensors.

On their device torch runs a composition of small operations, which keeps more memory. Attention
with a mask is assumed to be a fused kernel as well, except where torch has none: a bias that needs
a gradient (sinks) with grouped heads; that one stores its probabilities on CUDA too.
"""

from contextlib import AbstractContextManager
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten
_composed = F.scaled_dot_product_attention


def fused_attention() -> AbstractContextManager[Any]:
    """Context in which torch's attention is the fused one for CUDA if there is one."""
    return patch.object(F, "scaled_dot_product_attention", _attention)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, is_causal: bool, scale: float,
    enable_gqa: bool,
) -> Tensor:  # fmt: skip
    bias = attn_mask
    if bias is not None and bias.requires_grad and enable_gqa:
        return _composed(
            q, k, v, attn_mask=bias, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape, dtype=q.dtype, device=q.device)  # as torch does
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if bias is not None and bias.requires_grad:
        efficient = _aten._scaled_dot_product_efficient_attention
        return cast(Tensor, efficient(q, k, v, bias, True, 0.0, is_causal, scale=scale)[0])
    cudnn = _aten._scaled_dot_product_cudnn_attention
    return cast(Tensor, cudnn(q, k, v, bias, True, 0.0, is_causal, False, scale=scale)[0])
