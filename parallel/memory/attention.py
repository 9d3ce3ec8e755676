"""Memory of torch's fused attention for CUDA, for traced tensors.

On their device torch runs a composition of small operations, which keeps more memory. Only plain
causal attention is torch's; the other kinds are `kernels.layers.attention_varlen`.
"""

from contextlib import AbstractContextManager
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


def fused_attention() -> AbstractContextManager[Any]:
    """Context in which torch's attention is the fused one for CUDA if there is one."""
    return patch.object(F, "scaled_dot_product_attention", _attention)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, is_causal: bool, scale: float,
    enable_gqa: bool,
) -> Tensor:  # fmt: skip
    assert attn_mask is None
    cudnn = _aten._scaled_dot_product_cudnn_attention
    return cast(Tensor, cudnn(q, k, v, None, True, 0.0, is_causal, False, scale=scale)[0])
