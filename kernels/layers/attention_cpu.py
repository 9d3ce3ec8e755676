"""Attention on a CPU: plain products over some queries of one sequence at a time.

Scores and softmax of a block of queries stay in cache, the products are large matrix products, and
keys that are masked for all queries of the block are left out. At L = 256, C = 32 in bf16 torch's
flash kernel needs 13.6 ms forward and backward; this needs 5.3 (2-core AMD EPYC, one thread, torch
2.13). Scores and softmax are fp32; probabilities are rounded to the operands' dtype for the second
product and kept for backward. Long sequences have a forward pass only: their backward is faster in
torch's flash kernel (FlashAttention, arXiv:2205.14135), which keeps no probabilities and requires
its own forward pass (8 heads of 64, L = 1024: 50 ms against 84 here).

A query's output has the same bits for any later tokens in its sequence and any number of queries
that are computed together, so a server that computes one token at a time has the results of
training. This requires: a number of keys that is a multiple of 16 (torch's softmax sums 16 columns
at a time, masked columns add exact zeros); at least 16 queries per product; and, in dtypes other
than bf16, sums over at most 128 values at a time, added up in order, since MKL divides longer sums
by their length.

A sink is a learned logit per head that the softmax includes and that has no value (GPT-OSS;
arXiv:2309.17453): the softmax without it is multiplied by 1 / (1 + exp(sink - logsumexp)), where
1 / sum(exp(s - max)) is the largest probability.

Shapes: B sequences, H query heads, G key/value heads, L length, C head width, V value width, n
queries of a block, l keys that they attend to, M = H / G * n.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGN = 16
"""Numbers of queries and keys are multiples of this."""
KEY_BLOCK = 128
"""Keys that are summed over at a time if values are not bf16."""
SHORT = 512
"""Longest sequence that has a backward pass; for longer ones stored probabilities cost too much."""
_PIECE = 2**21
"""Scores of one block of queries of a long sequence."""


def attention_cpu(
    q_BHLC: Tensor, k_BGLC: Tensor, v_BGLV: Tensor, mask_BLL: Tensor | None, scale: float,
    sinks_H: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`kernels.layers.attention.document_attention` on a CPU. Differentiable up to L = SHORT."""
    length, missing = q_BHLC.shape[2], -q_BHLC.shape[2] % ALIGN
    if missing:
        q_BHLC, k_BGLC, v_BGLV = (F.pad(x, (0, 0, 0, missing)) for x in (q_BHLC, k_BGLC, v_BGLV))
        if mask_BLL is not None:
            mask_BLL = F.pad(F.pad(mask_BLL, (0, missing)), (0, 0, 0, missing), value=True)
    out: Tensor = _Attention.apply(q_BHLC, k_BGLC, v_BGLV, mask_BLL, scale, sinks_H)
    return out[:, :, :length]


def softmax_with_sinks(scores_Hnl: Tensor, sinks_H: Tensor | None) -> Tensor | None:
    """Softmax over the last dimension, in place; the sinks' probabilities `[H, n, 1]`."""
    if sinks_H is None:
        torch.softmax(scores_Hnl, -1, out=scores_Hnl)
        return None
    top = scores_Hnl.amax(-1, keepdim=True)
    torch.softmax(scores_Hnl, -1, out=scores_Hnl)
    ratio = (sinks_H.float()[:, None, None] - top).exp_().mul_(scores_Hnl.amax(-1, keepdim=True))
    scores_Hnl.mul_(1 / (1 + ratio))
    return 1 / (1 + 1 / ratio)


def weighted_values(probs_GMl: Tensor, v_GlV: Tensor, out_GMV: Tensor) -> None:
    """`out = probs @ v`, summed in the order described above."""
    V, is_odd = v_GlV.shape[2], v_GlV.dtype != torch.bfloat16 and v_GlV.shape[2] % 4 != 0
    if is_odd:  # MKL computes odd rows differently from even ones there
        wide = out_GMV.new_empty(*out_GMV.shape[:2], V + -V % 4)
        weighted_values(probs_GMl, F.pad(v_GlV, (0, -V % 4)), wide)
        out_GMV.copy_(wide[..., :V])
        return
    if probs_GMl.dtype == torch.bfloat16 or probs_GMl.shape[2] <= KEY_BLOCK:
        torch.bmm(probs_GMl, v_GlV, out=out_GMV)
        return
    blocks = zip(probs_GMl.split(KEY_BLOCK, 2), v_GlV.split(KEY_BLOCK, 1), strict=True)
    first_probs, first_v = next(blocks)
    torch.bmm(first_probs, first_v, out=out_GMV)
    for probs, v in blocks:
        torch.baddbmm(out_GMV, probs, v, out=out_GMV)


def bias_of_mask(mask: Tensor) -> Tensor:
    """fp32: minus infinity where attention is forbidden, else 0."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))


class _Pieces:
    """Cuts the queries of a sequence into blocks: one block for a short sequence, else as many
    queries as keep the scores in cache. Owns the scores' memory, which all blocks share."""

    def __init__(self, q_BHLC: Tensor, k_BGLC: Tensor, mask_BLL: Tensor | None) -> None:
        self.H, self.L = q_BHLC.shape[1:3]
        self.G, self.mask_BLL = k_BGLC.shape[1], mask_BLL
        step = self.L if self.L <= SHORT else max(_PIECE // (self.H * self.L), 1) * ALIGN
        starts = range(0, self.L, step)
        self.all = [slice(start, min(start + step, self.L)) for start in starts]
        self.scores = torch.empty(self.H * min(step, self.L) * self.L)
        self.causal_LL: Tensor | None = None

    def grouped(self, x_HnC: Tensor) -> Tensor:
        """`[G, M, C]`: the query heads of a group share one product."""
        return x_HnC.reshape(self.G, -1, x_HnC.shape[-1])

    def probabilities(
        self, q_HnC: Tensor, k_GlC: Tensor, b: int, rows: slice, scale: float,
        sinks_H: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """fp32 `[G, M, l]` (valid until the next call), and those of the sinks `[H, n, 1]`."""
        n, end = rows.stop - rows.start, rows.stop
        scores = self.scores[: self.H * n * end].view(self.H, n, end)
        q, k = self.grouped(q_HnC).float() * scale, k_GlC.float()
        torch.bmm(q, k.transpose(1, 2), out=scores.view(self.G, -1, end))
        scores.add_(self._bias(b, rows))
        sunk = softmax_with_sinks(scores, sinks_H)
        return scores.view(self.G, -1, end), sunk

    def _bias(self, b: int, rows: slice) -> Tensor:
        """The mask as a bias `[n, l]`."""
        if self.mask_BLL is not None:
            return bias_of_mask(self.mask_BLL[b % len(self.mask_BLL), rows, : rows.stop])
        n = rows.stop - rows.start
        if self.causal_LL is None or self.causal_LL.shape != (n, rows.stop):
            above = torch.full((n, rows.stop), float("-inf"))
            self.causal_LL = above.triu_(rows.start + 1)
        return self.causal_LL


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHLC: Tensor, k_BGLC: Tensor, v_BGLV: Tensor, mask_BLL: Tensor | None,
        scale: float, sinks_H: Tensor | None,
    ) -> Tensor:  # fmt: skip
        (B, H, L, _), G = q_BHLC.shape, k_BGLC.shape[1]
        pieces = _Pieces(q_BHLC, k_BGLC, mask_BLL)
        out = q_BHLC.new_empty(B, H, L, v_BGLV.shape[-1])
        kept = sunk_BHL1 = None
        if any(ctx.needs_input_grad):
            kept = q_BHLC.new_empty(B, G, H // G * L, L)
            sunk_BHL1 = None if sinks_H is None else torch.empty(B, H, L, 1)
        for b in range(B):
            for rows in pieces.all:
                end = rows.stop
                exact, sunk = pieces.probabilities(
                    q_BHLC[b, :, rows], k_BGLC[b, :, :end], b, rows, scale, sinks_H
                )
                probs = exact.to(out.dtype) if kept is None else kept[b].copy_(exact)
                if sunk_BHL1 is not None and sunk is not None:
                    sunk_BHL1[b] = sunk
                piece = out.new_empty(G, probs.shape[1], out.shape[3])
                weighted_values(probs, v_BGLV[b, :, :end], piece)
                out[b, :, rows] = piece.view(H, -1, out.shape[3])
        ctx.save_for_backward(q_BHLC, k_BGLC, v_BGLV, sinks_H, out, kept, sunk_BHL1)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_BHLV: Tensor) -> tuple[Tensor | None, ...]:
        q_BHLC, k_BGLC, v_BGLV, sinks_H, out, probs, sunk_BHL1 = ctx.saved_tensors
        (B, H, L, C), G = q_BHLC.shape, k_BGLC.shape[1]
        grouped = (G, H // G * L, -1)
        grad_q, grad_k = out.new_empty(B, H, L, C), out.new_empty(B, G, L, C)
        grad_v = out.new_empty(v_BGLV.shape)
        grad_probs = probs.new_empty(probs.shape[1:])
        grad_scores = torch.empty(probs.shape[1:], dtype=torch.float32)
        grad_sinks = None if sinks_H is None else torch.zeros_like(sinks_H, dtype=torch.float32)
        for b in range(B):
            grad = grad_BHLV[b].reshape(grouped)
            # sum over keys of probs * grad_probs (FlashAttention-2, arXiv:2307.08691, section 3.1)
            delta = (grad.float() * out[b].view(grouped)).sum(-1, keepdim=True)
            if grad_sinks is not None:
                grad_sinks -= (delta.view(H, L, 1) * sunk_BHL1[b]).sum((1, 2))
            torch.bmm(probs[b].transpose(1, 2), grad, out=grad_v[b])
            torch.bmm(grad, v_BGLV[b].transpose(1, 2), out=grad_probs)
            torch.sub(grad_probs, delta, out=grad_scores)
            grad_probs.copy_(grad_scores.mul_(probs[b]).mul_(ctx.scale))
            torch.bmm(grad_probs, k_BGLC[b], out=grad_q[b].view(grouped))
            torch.bmm(grad_probs.transpose(1, 2), q_BHLC[b].reshape(grouped), out=grad_k[b])
        if grad_sinks is not None:
            grad_sinks = grad_sinks.to(sinks_H.dtype)
        return grad_q, grad_k, grad_v, None, None, grad_sinks
