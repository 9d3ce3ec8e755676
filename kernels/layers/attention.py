"""Causal attention within documents: softmax(scale * q k^T) v, grouped heads, optional sinks.

On CUDA, and for long sequences, this is torch's `scaled_dot_product_attention`. For short
sequences on a CPU its flash kernel is not the fastest: at L = 256, C = 32 in bf16 it needs
13.6 ms forward and backward where plain products over one sequence at a time need 5.3 ms
(2-core AMD EPYC, one thread, torch 2.13): scores and softmax of one sequence stay in cache, the
products are large matrix products. Scores and softmax are fp32; the probabilities are stored in
the operands' dtype for backward (FlashAttention, arXiv:2205.14135, recomputes them instead, which
pays where memory is the bottleneck).

A sink is a learned logit per head that takes its share of the softmax and holds no value (GPT-OSS;
arXiv:2309.17453). It is one more key of zeros with the sink as its bias, and a value of zeros.

Shapes: B sequences, H query heads, G key/value heads, L length, C head width, V value width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SHORT = 512
"""Longest sequence for which stored probabilities are worth their memory."""


def document_attention(
    q_BHLC: Tensor,
    k_BGLC: Tensor,
    v_BGLV: Tensor,
    mask_BLL: Tensor | None,
    scale: float,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """`o_BHLV`. Differentiable in q, k, v and the sinks.

    mask_BLL: bool, true where query (row) may see key (column), each row at least once; None
    stands for plain causal attention. scale: factor on the logits. sinks_H: logits, or None.
    """
    short = q_BHLC.device.type == "cpu" and q_BHLC.shape[2] <= _SHORT
    if short and sinks_H is None:
        out: Tensor = _ShortAttention.apply(q_BHLC, k_BGLC, v_BGLV, mask_BLL, scale)
        return out
    return document_attention_reference(q_BHLC, k_BGLC, v_BGLV, mask_BLL, scale, sinks_H)


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


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BHLC: Tensor,
        k_BGLC: Tensor,
        v_BGLV: Tensor,
        mask_BLL: Tensor | None,
        scale: float,
    ) -> Tensor:
        (B, H, L, _), G = q_BHLC.shape, k_BGLC.shape[1]
        grouped = (G, H // G * L, -1)  # the query heads of a group share one product
        bias = _bias(mask_BLL, L, q_BHLC.device)
        scores = torch.empty(H, L, L, dtype=torch.float32)
        probs = q_BHLC.new_empty(B, G, H // G * L, L)
        out = q_BHLC.new_empty(B, H, L, v_BGLV.shape[-1])
        for b in range(B):
            q, k = q_BHLC[b].float() * scale, k_BGLC[b].float()
            torch.bmm(q.reshape(grouped), k.transpose(1, 2), out=scores.view(G, -1, L))
            scores.add_(bias[b % len(bias)])
            torch.softmax(scores, -1, out=scores)
            probs[b].copy_(scores.view(G, -1, L))
            torch.bmm(probs[b], v_BGLV[b], out=out[b].view(grouped))
        ctx.save_for_backward(q_BHLC, k_BGLC, v_BGLV, probs, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_BHLV: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_BHLC, k_BGLC, v_BGLV, probs, out = ctx.saved_tensors
        (B, H, L, C), G = q_BHLC.shape, k_BGLC.shape[1]
        grouped = (G, H // G * L, -1)
        grad_q, grad_k = out.new_empty(B, H, L, C), out.new_empty(B, G, L, C)
        grad_v = out.new_empty(v_BGLV.shape)
        grad_probs = probs.new_empty(probs.shape[1:])
        grad_scores = torch.empty(probs.shape[1:], dtype=torch.float32)
        for b in range(B):
            grad = grad_BHLV[b].reshape(grouped)
            # sum over keys of probs * grad_probs (FlashAttention-2, arXiv:2307.08691, section 3.1)
            delta = (grad.float() * out[b].view(grouped)).sum(-1, keepdim=True)
            torch.bmm(probs[b].transpose(1, 2), grad, out=grad_v[b])
            torch.bmm(grad, v_BGLV[b].transpose(1, 2), out=grad_probs)
            torch.sub(grad_probs, delta, out=grad_scores)
            grad_probs.copy_(grad_scores.mul_(probs[b]).mul_(ctx.scale))
            torch.bmm(grad_probs, k_BGLC[b], out=grad_q[b].view(grouped))
            torch.bmm(grad_probs.transpose(1, 2), q_BHLC[b].reshape(grouped), out=grad_k[b])
        return grad_q, grad_k, grad_v, None, None


def _bias(mask_BLL: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Minus infinity where attention is forbidden, else 0: fp32 `[B or 1, L, L]`."""
    if mask_BLL is None:
        return torch.full((1, length, length), float("-inf"), device=device).triu_(1)
    return torch.zeros(mask_BLL.shape, device=device).masked_fill_(~mask_BLL, float("-inf"))
