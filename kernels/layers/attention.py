"""Causal attention within documents: softmax(scale * q k^T) v, grouped heads, optional sinks.

Plain causal attention on CUDA is torch's `scaled_dot_product_attention`, and so is attention on a
CPU where its gradients are needed and torch computes them faster (`_is_faster_by_torch`).
Everything else is `kernels.layers.attention_cpu`, whose memory is linear in the length. CUDA uses
that in fp32 only: see `kernels.layers.attention_varlen`.

A sink is a learned logit per head that the softmax includes and that has no value (GPT-OSS;
arXiv:2309.17453). For torch it is one more key of zeros with the sink as its bias, and a value of
zeros.

Shapes: B sequences, H query heads, G key/value heads, L length, C head width, V value width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layers.attention_cpu import SHORT, attention_cpu


def document_attention(
    q_BHLC: Tensor,
    k_BGLC: Tensor,
    v_BGLV: Tensor,
    mask_BLL: Tensor | None,
    scale: float,
    sinks_H: Tensor | None = None,
    window: int = 0,
    keep: bool = True,
) -> Tensor:
    """`o_BHLV`. Differentiable in q, k, v and the sinks.

    Args:
        q_BHLC, k_BGLC, v_BGLV: Queries, keys and values.
        mask_BLL: bool, true where a query (row) may attend to a key (column), at least once per
            row; None for plain causal attention.
        scale: Factor on the logits.
        sinks_H: Logits, or None.
        window: Without a mask, number of keys up to its own that a query attends to; 0: all.
        keep: It may keep the probabilities of a short sequence for backward.
    """
    if q_BHLC.device.type != "cpu":
        if mask_BLL is None and sinks_H is None and not window:
            return document_attention_reference(q_BHLC, k_BGLC, v_BGLV, None, scale)
    elif sinks_H is None and not window:
        differentiated = any(x.requires_grad for x in (q_BHLC, k_BGLC, v_BGLV))
        if torch.is_grad_enabled() and differentiated and _is_faster_by_torch(q_BHLC, mask_BLL):
            return _flash_attention(q_BHLC, k_BGLC, v_BGLV, mask_BLL, scale)
    return attention_cpu(q_BHLC, k_BGLC, v_BGLV, mask_BLL, scale, sinks_H, window, keep)


def _is_faster_by_torch(q_BHLC: Tensor, mask_BLL: Tensor | None) -> bool:
    """Whether torch's flash kernel computes values and gradients faster on a CPU: in fp32, and
    without a mask in long sequences.

    CPU ms in fp32, with gradients, of `attention_cpu` and of torch (AMD EPYC with AVX2, one thread,
    torch 2.13, least of 25): 80 and 41 for 8 sequences of 256, 8 heads of 32, 4 of keys; 72 and 43
    with a mask of documents.
    """
    return q_BHLC.dtype == torch.float32 or (mask_BLL is None and q_BHLC.shape[2] > SHORT)


def _flash_attention(
    q_BHLC: Tensor, k_BGLC: Tensor, v_BGLV: Tensor, mask_BLL: Tensor | None, scale: float
) -> Tensor:
    """`document_attention` by torch's flash kernel for a CPU. It requires heads of one width:
    otherwise torch would store all scores."""
    C, V = q_BHLC.shape[3], v_BGLV.shape[3]
    if C < V:
        q_BHLC, k_BGLC = (F.pad(x, (0, V - C)) for x in (q_BHLC, k_BGLC))
    elif V < C:
        v_BGLV = F.pad(v_BGLV, (0, C - V))
    return document_attention_reference(q_BHLC, k_BGLC, v_BGLV, mask_BLL, scale)[..., :V]


def document_attention_reference(
    q_BHLC: Tensor,
    k_BGLC: Tensor,
    v_BGLV: Tensor,
    mask_BLL: Tensor | None,
    scale: float,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Torch's attention with the same signature."""
    mask = None if mask_BLL is None else mask_BLL[:, None]
    if sinks_H is not None:
        k_BGLC, v_BGLV = F.pad(k_BGLC, (0, 0, 0, 1)), F.pad(v_BGLV, (0, 0, 0, 1))
        mask = _bias_with_sinks(mask_BLL, q_BHLC, sinks_H)
    return F.scaled_dot_product_attention(
        q_BHLC,
        k_BGLC,
        v_BGLV,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q_BHLC.shape[1] != k_BGLC.shape[1],
    )


def _bias_with_sinks(mask_BLL: Tensor | None, q_BHLC: Tensor, sinks_H: Tensor) -> Tensor:
    """`[B or 1, H, L, L + 1]` in the dtype of q: 0 or minus infinity, and the sink at the end."""
    length = q_BHLC.shape[2]
    bias_BLL = _bias(mask_BLL, length, q_BHLC.device).to(q_BHLC.dtype)
    bias = bias_BLL[:, None].expand(-1, len(sinks_H), -1, -1)
    column = sinks_H.to(q_BHLC.dtype)[:, None, None].expand(bias.shape[0], -1, length, 1)
    return torch.cat([bias, column], dim=-1)


def _bias(mask_BLL: Tensor | None, length: int, device: torch.device) -> Tensor:
    """fp32 `[B or 1, L, L]`: minus infinity where attention is forbidden, else 0."""
    if mask_BLL is None:
        return torch.full((1, length, length), float("-inf"), device=device).triu_(1)
    return torch.zeros(mask_BLL.shape, device=device).masked_fill_(~mask_BLL, float("-inf"))
