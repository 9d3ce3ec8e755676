"""Attention on a CPU, and on CUDA in fp32: plain products over some queries of one sequence at a
time.

Scores and softmax of a block of queries stay in cache, the products are large matrix products, and
keys that are masked for all queries of the block are left out. At L = 256, C = 32 in bf16 torch's
flash kernel needs 13.6 ms forward and backward; this needs 5.3 (2-core AMD EPYC, one thread, torch
2.13). Scores and softmax are fp32; probabilities are rounded to the operands' dtype for the second
product and kept for backward; for long sequences backward computes them again, block by block, so
memory is linear in L. Without a window and sinks, gradients of long sequences, and in fp32 of all,
are faster in torch's flash kernel (FlashAttention, arXiv:2205.14135), which requires its own
forward pass (8 heads of 64, L = 1024: 50 ms against 84 here).

A query's output has the same bits for any later tokens in its sequence and any number of queries
that are computed together, so a server that computes one token at a time has the results of
evaluation. This requires: a number of keys that is a multiple of 16 (torch's softmax sums 16
columns at a time, masked columns add exact zeros); at least 16 queries per product; and, in dtypes
other than bf16, sums over at most 128 values at a time, added up in order, since MKL divides longer
sums by their length.

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
"""Longest sequence whose probabilities may be kept for backward."""
_PIECE = 2**21
"""Scores of one block of queries of a long sequence."""
_LEAST = 4
"""Smallest block, in multiples of ALIGN: with many heads fewer queries make products too small."""
_BAND = 256
"""Queries of a block if there is a window, or as many as the window is long."""


def attention_cpu(
    q_BHLC: Tensor, k_BGLC: Tensor, v_BGLV: Tensor, mask_BLL: Tensor | None, scale: float,
    sinks_H: Tensor | None = None, window: int = 0, keep: bool = True,
) -> Tensor:  # fmt: skip
    """`kernels.layers.attention.document_attention` on a CPU."""
    length, missing = q_BHLC.shape[2], -q_BHLC.shape[2] % ALIGN
    if missing:
        q_BHLC, k_BGLC, v_BGLV = (F.pad(x, (0, 0, 0, missing)) for x in (q_BHLC, k_BGLC, v_BGLV))
        if mask_BLL is not None:
            mask_BLL = F.pad(F.pad(mask_BLL, (0, missing)), (0, 0, 0, missing), value=True)
    out: Tensor = _Attention.apply(q_BHLC, k_BGLC, v_BGLV, mask_BLL, scale, sinks_H, window, keep)
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
    queries as keep the scores in cache. Owns the scores' memory, which all blocks share.

    window: number of tokens that a query attends to; 0: all before it.
    """

    def __init__(
        self, q_BHLC: Tensor, k_BGLC: Tensor, mask_BLL: Tensor | None, window: int
    ) -> None:
        self.H, self.L = q_BHLC.shape[1:3]
        self.G, self.mask_BLL, self.window = k_BGLC.shape[1], mask_BLL, window
        step = (
            self.L if self.L <= SHORT else max(_PIECE // (self.H * self.L * ALIGN), _LEAST) * ALIGN
        )
        if window and self.L > SHORT:
            step = max(_BAND, window + -window % ALIGN)
        starts = range(0, self.L, step)
        self.all = [slice(start, min(start + step, self.L)) for start in starts]
        most = 0
        for rows in self.all:
            most = max(most, rows.stop - self.keys(rows).start)
        self.device = q_BHLC.device
        self.scores = torch.empty(self.H * min(step, self.L) * most, device=self.device)
        self._biases: tuple[tuple[int, int], Tensor] | None = None

    def keys(self, rows: slice) -> slice:
        """The keys that some of the queries `rows` attend to. The first one is a multiple of
        KEY_BLOCK, so that sums are divided as if all keys were there."""
        first = max(rows.start - self.window + 1, 0) if self.window else 0
        return slice(first // KEY_BLOCK * KEY_BLOCK, rows.stop)

    def grouped(self, x_HnC: Tensor) -> Tensor:
        """`[G, M, C]`: the query heads of a group share one product."""
        return x_HnC.reshape(self.G, -1, x_HnC.shape[-1])

    def probabilities(
        self, q_HnC: Tensor, k_GlC: Tensor, b: int, rows: slice, scale: float,
        sinks_H: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """fp32 `[G, M, l]` (valid until the next call), and those of the sinks `[H, n, 1]`."""
        n, width = rows.stop - rows.start, k_GlC.shape[1]
        scores = self.scores[: self.H * n * width].view(self.H, n, width)
        q, k = self.grouped(q_HnC).float() * scale, k_GlC.float()
        torch.bmm(q, k.transpose(1, 2), out=scores.view(self.G, -1, width))
        scores.add_(self._bias(b, rows))
        sunk = softmax_with_sinks(scores, sinks_H)
        return scores.view(self.G, -1, width), sunk

    def _bias(self, b: int, rows: slice) -> Tensor:
        """The mask as a bias `[n, l]`."""
        keys = self.keys(rows)
        if self.mask_BLL is not None:
            return bias_of_mask(self.mask_BLL[b % len(self.mask_BLL), rows, keys])
        n, before = rows.stop - rows.start, rows.start - keys.start
        if self._biases is None or self._biases[0] != (n, before):
            forbidden = torch.full((n, before + n), float("-inf"), device=self.device)
            bias = forbidden.triu(before + 1)
            if self.window:
                bias += forbidden.tril_(before - self.window)
            self._biases = (n, before), bias
        return self._biases[1]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHLC: Tensor, k_BGLC: Tensor, v_BGLV: Tensor, mask_BLL: Tensor | None,
        scale: float, sinks_H: Tensor | None, window: int, keep: bool,
    ) -> Tensor:  # fmt: skip
        (B, H, L, _), G = q_BHLC.shape, k_BGLC.shape[1]
        pieces = _Pieces(q_BHLC, k_BGLC, mask_BLL, window)
        out = q_BHLC.new_empty(B, H, L, v_BGLV.shape[-1])
        kept = sunk_BHL1 = None
        if any(ctx.needs_input_grad) and L <= SHORT and keep:
            kept = q_BHLC.new_empty(B, G, H // G * L, L)
            sunk_BHL1 = None if sinks_H is None else torch.empty(B, H, L, 1, device=out.device)
        for b in range(B):
            for rows in pieces.all:
                keys = pieces.keys(rows)
                exact, sunk = pieces.probabilities(
                    q_BHLC[b, :, rows], k_BGLC[b, :, keys], b, rows, scale, sinks_H
                )
                probs = exact.to(out.dtype) if kept is None else kept[b].copy_(exact)
                if sunk_BHL1 is not None and sunk is not None:
                    sunk_BHL1[b] = sunk
                piece = out.new_empty(G, probs.shape[1], out.shape[3])
                weighted_values(probs, v_BGLV[b, :, keys], piece)
                out[b, :, rows] = piece.view(H, -1, out.shape[3])
        ctx.save_for_backward(q_BHLC, k_BGLC, v_BGLV, sinks_H, out, kept, sunk_BHL1, mask_BLL)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    def backward(ctx: Any, grad_BHLV: Tensor) -> tuple[Tensor | None, ...]:
        q_BHLC, k_BGLC, v_BGLV, sinks_H, out, kept, sunk_BHL1, mask_BLL = ctx.saved_tensors
        pieces = _Pieces(q_BHLC, k_BGLC, mask_BLL, ctx.window)
        gradients = _Gradients(q_BHLC, k_BGLC, v_BGLV, sinks_H, ctx.scale, len(pieces.all) > 1)
        for b in range(len(q_BHLC)):
            for rows in pieces.all:
                keys = pieces.keys(rows)
                if kept is None:
                    exact, sunk = pieces.probabilities(
                        q_BHLC[b, :, rows], k_BGLC[b, :, keys], b, rows, ctx.scale, sinks_H
                    )
                    probs = exact.to(out.dtype)
                else:
                    probs, sunk = kept[b], None if sunk_BHL1 is None else sunk_BHL1[b]
                gradients.add(
                    b, rows, keys, probs, sunk, pieces.grouped(grad_BHLV[b, :, rows]),
                    pieces.grouped(out[b, :, rows]),
                )  # fmt: skip
        grad_q, grad_k, grad_v, grad_sinks = gradients.results()
        return grad_q, grad_k, grad_v, None, None, grad_sinks, None, None


class _Gradients:
    """Gradients of q, k, v and the sinks, summed over blocks of queries.

    several: a key belongs to several blocks; its gradient is summed in fp32.
    """

    def __init__(
        self, q_BHLC: Tensor, k_BGLC: Tensor, v_BGLV: Tensor, sinks_H: Tensor | None, scale: float,
        several: bool,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.scale, self.several = q_BHLC, k_BGLC, v_BGLV, scale, several
        self.grad_q = q_BHLC.new_empty(q_BHLC.shape)
        wide = torch.float32 if several else k_BGLC.dtype
        make = torch.zeros if several else torch.empty
        self.grad_k = make(k_BGLC.shape, dtype=wide, device=k_BGLC.device)
        self.grad_v = make(v_BGLV.shape, dtype=wide, device=v_BGLV.device)
        self._buffers = k_BGLC.new_empty(0), torch.empty(0)
        self.sinks = sinks_H
        self.grad_sinks = None
        if sinks_H is not None:
            self.grad_sinks = torch.zeros(sinks_H.shape, device=sinks_H.device)

    def add(
        self, b: int, rows: slice, keys: slice, probs_GMl: Tensor, sunk_Hn1: Tensor | None,
        grad_GMV: Tensor, out_GMV: Tensor,
    ) -> None:  # fmt: skip
        """Add one block: its probabilities, those of its sinks, and gradient and value of its
        output."""
        G, H, n = probs_GMl.shape[0], self.q.shape[1], rows.stop - rows.start
        k_GlC, v_GlV = self.k[b, :, keys], self.v[b, :, keys]
        q_GMC = self.q[b, :, rows].reshape(G, -1, self.q.shape[3])
        # sum over keys of probs * grad_probs (FlashAttention-2, arXiv:2307.08691, section 3.1)
        delta_GM1 = (grad_GMV.float() * out_GMV).sum(-1, keepdim=True)
        if self.grad_sinks is not None and sunk_Hn1 is not None:
            self.grad_sinks -= (delta_GM1.view(H, n, 1) * sunk_Hn1).sum((1, 2))
        self._sum(self.grad_v[b, :, keys], probs_GMl.transpose(1, 2), grad_GMV)
        if self._buffers[0].shape != probs_GMl.shape:
            self._buffers = (
                torch.empty_like(probs_GMl),
                torch.empty_like(probs_GMl, dtype=torch.float32),
            )
        grad_probs, grad_scores = self._buffers
        torch.bmm(grad_GMV, v_GlV.transpose(1, 2), out=grad_probs)
        torch.sub(grad_probs, delta_GM1, out=grad_scores)
        grad_probs.copy_(grad_scores.mul_(probs_GMl).mul_(self.scale))
        grad_q = torch.bmm(grad_probs, k_GlC)
        self.grad_q[b, :, rows] = grad_q.view(H, n, -1)
        self._sum(self.grad_k[b, :, keys], grad_probs.transpose(1, 2), q_GMC)

    def _sum(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        if self.several:
            total += torch.bmm(a, b)
        else:
            torch.bmm(a, b, out=total)

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        grad_sinks = self.grad_sinks
        if grad_sinks is not None and self.sinks is not None:
            grad_sinks = grad_sinks.to(self.sinks.dtype)
        return self.grad_q, self.grad_k.to(self.k.dtype), self.grad_v.to(self.v.dtype), grad_sinks
