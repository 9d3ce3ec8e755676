"""The attention core of serving, with keys and values in pages.

Every request attends separately, to its own keys in order, with the arithmetic and the order of
sums of training (`kernels.layers.attention_cpu`). So its output has the bits of training's forward
pass for any other requests in the batch and any chunking of its tokens: masked keys add exact
zeros, and pages outside a layer's window or chunk are not read.

This form copies the pages of one request at a time and runs everywhere; `serve.engine.fused`
replaces it where possible.

T tokens of the step, n those of one request, l keys to which they attend, H query heads, G
key/value heads, C head width, V value width, N width of the latents.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.model import AttentionConfig
from kernels.layers.attention_cpu import (
    ALIGN,
    KEY_BLOCK,
    bias_of_mask,
    softmax_with_sinks,
    weighted_values,
)
from kernels.quantization.quantize import dequantize_128x128
from models.attention import Layer, expanded
from models.layers.linear import Fp8Linear, Linear
from serve.cache.kv_cache import KvCache
from serve.engine.batch import ForwardBatch


@dataclass(frozen=True)
class _Seen:
    """The keys of one request to which it attends in a layer."""

    pages: Tensor
    """int64: the pages that are read."""
    skip: int
    """Tokens of the first page that are skipped."""
    n_valid: int
    """Keys from there to the request's last token."""
    bias_nl: Tensor
    """fp32: 0, or minus infinity; l is `n_valid` rounded up to ALIGN."""


class PagedAttention:
    """An `AttentionCore` for one step. Rows after those of the batch repeat the last one."""

    def __init__(self, cache: KvCache, batch: ForwardBatch, absorbed: bool = False) -> None:
        """absorbed: MLA multiplies queries and outputs by the projection of keys and values
        instead of expanding every latent (DeepSeek-V2, arXiv:2405.04434, section 2.1.2)."""
        self.cache, self.absorbed = cache, absorbed
        self.latent = self._latent if cache.is_latent else None
        self.starts = batch.query_starts.tolist()
        self.lengths = batch.key_lengths.tolist()
        self.tables = batch.page_tables.long()
        counts = (batch.query_starts[1:] - batch.query_starts[:-1]).long()
        request_T = torch.repeat_interleave(torch.arange(len(counts)), counts)
        size, device = cache.page_size, cache.device
        pages_T = self.tables[request_T, batch.positions.cpu() // size]
        self.pages_T, self.offsets_T = pages_T.to(device), (batch.positions % size).to(device)
        self.seen: dict[tuple[int, int], list[_Seen]] = {}

    def __call__(
        self, layer: Layer, q_THC: Tensor, k_TGC: Tensor, v_TGV: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        T = len(self.pages_T)
        keys, values = self.cache.keys(layer.index), self.cache.values(layer.index)
        keys[self.pages_T, :, :, self.offsets_T] = k_TGC[:T]
        values[self.pages_T, :, self.offsets_T] = v_TGV[:T]
        o_THV = q_THC.new_empty(*q_THC.shape[:2], v_TGV.shape[2])
        for b, seen in enumerate(self._seen(layer)):
            rows = slice(self.starts[b], self.starts[b + 1])
            k_GCl = _cut(keys[seen.pages].permute(1, 2, 0, 3).flatten(2), 2, seen)
            v_GlV = _cut(values[seen.pages].transpose(0, 1).flatten(1, 2), 1, seen)
            o_THV[rows] = _attend(q_THC[rows], k_GCl, v_GlV, seen.bias_nl, layer.scale, sinks_H)
        o_THV[T:] = o_THV[T - 1]
        return o_THV

    def _latent(
        self, layer: Layer, q_THC: Tensor, latent_TR: Tensor, k_rope_TC: Tensor, wkv_b: Linear,
        config: AttentionConfig,
    ) -> Tensor:  # fmt: skip
        T, rank = len(self.pages_T), latent_TR.shape[1]
        latents = self.cache.latents(layer.index)
        latents[self.pages_T, self.offsets_T] = torch.cat([latent_TR, k_rope_TC], -1)[:T]
        o_THV = q_THC.new_empty(*q_THC.shape[:2], config.v_head_dim)
        for b, seen in enumerate(self._seen(layer)):
            rows = slice(self.starts[b], self.starts[b + 1])
            kept_lN = _cut(latents[seen.pages].flatten(0, 1), 0, seen)
            if self.absorbed:
                o_THV[rows] = _attend_absorbed(
                    q_THC[rows], kept_lN, wkv_b, config, seen.bias_nl, layer.scale
                )
                continue
            k_lHC, v_lHV = expanded(kept_lN[:, :rank], kept_lN[:, None, rank:], wkv_b, config)
            k_HCl, v_HlV = k_lHC.permute(1, 2, 0), v_lHV.transpose(0, 1)
            o_THV[rows] = _attend(q_THC[rows], k_HCl, v_HlV, seen.bias_nl, layer.scale, None)
        o_THV[T:] = o_THV[T - 1]
        return o_THV

    def _seen(self, layer: Layer) -> list[_Seen]:
        """The keys of every request; layers with the same window share the result."""
        key = layer.window, layer.chunk
        if key not in self.seen:
            self.seen[key] = [self._see(b, *key) for b in range(len(self.lengths))]
        return self.seen[key]

    def _see(self, b: int, window: int, chunk: int) -> _Seen:
        end, n = self.lengths[b], self.starts[b + 1] - self.starts[b]
        first = max(end - n - window + 1, 0) if window else 0
        first = (end - n) // chunk * chunk if chunk else first
        first = first // KEY_BLOCK * KEY_BLOCK  # sums start at the same keys as in training
        size, device = self.cache.page_size, self.cache.device
        pages = self.tables[b, first // size : self.cache.pages_for(end)].to(device)
        queries = torch.arange(end - n, end, device=device)[:, None]
        keys = first + torch.arange(-(-(end - first) // ALIGN) * ALIGN, device=device)
        visible = keys <= queries
        if window:
            visible &= queries - keys < window
        if chunk:
            visible &= queries // chunk == keys // chunk
        return _Seen(pages, first % size, end - first, bias_of_mask(visible))


def _cut(pages: Tensor, dim: int, seen: _Seen) -> Tensor:
    """The l keys of copied pages along `dim`, zero after the last valid one, where a page may
    contain any values."""
    valid = pages.narrow(dim, seen.skip, seen.n_valid)
    missing = seen.bias_nl.shape[1] - seen.n_valid
    return F.pad(valid, [0, 0] * (pages.dim() - 1 - dim) + [0, missing])


def _attend(
    q_nHC: Tensor, k_GCl: Tensor, v_GlV: Tensor, bias_nl: Tensor, scale: float,
    sinks_H: Tensor | None,
) -> Tensor:  # fmt: skip
    """`[n, H, V]`, computed as in `kernels.layers.attention_cpu` for a block of queries."""
    (n, H, _), G = q_nHC.shape, len(k_GCl)
    probs = _probabilities(q_nHC.float() * scale, k_GCl.float(), bias_nl, sinks_H)
    out_GMV = v_GlV.new_empty(G, probs.shape[1], v_GlV.shape[2])
    weighted_values(probs.to(v_GlV.dtype), v_GlV.contiguous(), out_GMV)
    return out_GMV[:, : H // G * n].reshape(H, n, -1).transpose(0, 1)


def _probabilities(q_nHC: Tensor, k_GCl: Tensor, bias_nl: Tensor, sinks_H: Tensor | None) -> Tensor:
    """fp32 `[G, M, l]`; M is at least n H / G, and a multiple of ALIGN."""
    (n, H, C), G = q_nHC.shape, len(k_GCl)
    q_GMC = q_nHC.transpose(0, 1).reshape(G, H // G * n, C)
    used = q_GMC.shape[1]
    q_GMC = F.pad(q_GMC, (0, 0, 0, -used % ALIGN))
    scores_GMl = torch.bmm(q_GMC, k_GCl)
    scores = scores_GMl[:, :used].reshape(H, n, -1) + bias_nl
    softmax_with_sinks(scores, sinks_H)
    scores_GMl.zero_()[:, :used] = scores.view(G, used, -1)
    return scores_GMl


def _attend_absorbed(
    q_nHC: Tensor, kept_lN: Tensor, wkv_b: Linear, config: AttentionConfig, bias_nl: Tensor,
    scale: float,
) -> Tensor:  # fmt: skip
    """`[n, H, V]`: every head is a query of one shared key, the latent and its rotated part."""
    n, H = q_nHC.shape[:2]
    plain, rank = config.qk_nope_head_dim, config.kv_lora_rank
    w_HXR = plain_weight(wkv_b).unflatten(0, (H, -1))
    q_HmC = F.pad(q_nHC.float().transpose(0, 1), (0, 0, 0, -n % ALIGN))
    q_HmR = _product(q_HmC[..., :plain], w_HXR[:, :plain])
    q_nHN = torch.cat([q_HmR, q_HmC[..., plain:]], -1).transpose(0, 1)[:n] * scale
    kept_1lN = kept_lN.float()[None]
    probs_1Ml = _probabilities(q_nHN, kept_1lN.transpose(1, 2), bias_nl, None)
    o_1MR = probs_1Ml.new_empty(1, probs_1Ml.shape[1], rank)
    weighted_values(probs_1Ml, kept_1lN[:, :, :rank].contiguous(), o_1MR)
    o_HmR = F.pad(o_1MR[0, : H * n].view(H, n, rank), (0, 0, 0, -n % ALIGN))
    return _product(o_HmR, w_HXR[:, plain:].mT)[:, :n].transpose(0, 1).to(q_nHC.dtype)


def plain_weight(linear: Linear, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight in `dtype`; for a module in FP8, the dequantized weight."""
    if isinstance(linear, Fp8Linear):
        weight = linear.fp8_weight("weight")
        return dequantize_128x128(weight.data, weight.scales, dtype)
    values: Tensor = linear.weight.to(dtype)
    return values


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` with a multiple of ALIGN columns: MKL computes rows of narrow products
    differently."""
    n = b.shape[2]
    return torch.bmm(a, F.pad(b, (0, -n % ALIGN)))[..., :n]
