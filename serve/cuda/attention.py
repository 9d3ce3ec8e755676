"""The attention core of serving on CUDA: `kernels.paged_attention` on the pages of the cache.

Multi-head latent attention always uses the absorbed form (DeepSeek-V2, arXiv:2405.04434, section
2.1.2): queries and outputs are multiplied by the projection of keys and values, so that the kernel
reads latents only. Sums are in another order than in training, so the last bits differ; on a CPU
`serve.engine.attention` has those of training.

T tokens, H query heads, G key/value heads, C head width, V value width, R width of the latents, X
width of a head's key and value without the rotated part.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from configs.model import AttentionConfig
from kernels.paged_attention.batch import PagedBatch
from kernels.paged_attention.paged_attention import (
    paged_attention,
    paged_latent_attention,
    write_pages,
)
from models.attention import Layer
from models.layers.linear import Linear
from serve.cache.kv_cache import KvCache
from serve.engine.attention import plain_weight
from serve.engine.batch import ForwardBatch


@dataclass(frozen=True)
class DeviceBatch:
    """The inputs of a forward pass, on the device of the cache."""

    tokens: Tensor
    """int64 `[T]`."""
    positions: Tensor
    """int64 `[T]`."""
    slots: Tensor
    """int64 `[T]`: where each token's keys and values are written; negative: nowhere."""
    requests: PagedBatch


def to_device(batch: ForwardBatch, page_size: int, device: torch.device) -> DeviceBatch:
    """Start copying a batch to `device`, without waiting for it."""
    counts = batch.query_starts.diff()
    return DeviceBatch(
        send(batch.tokens, device),
        send(batch.positions, device),
        send(batch.slots(page_size), device),
        PagedBatch(
            send(batch.page_tables, device),
            send(batch.query_starts, device),
            send(batch.key_lengths, device),
            int((counts == 1).cumprod(0).sum()),
        ),
    )


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`. From pageable memory a copy could wait for the kernels before it."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class KernelAttention:
    """An `AttentionCore` for one step."""

    def __init__(self, cache: KvCache, batch: DeviceBatch) -> None:
        self.cache, self.slots_T, self.requests = cache, batch.slots, batch.requests
        self.latent = self._latent if cache.is_latent else None

    def __call__(
        self, layer: Layer, q_THC: Tensor, k_TGC: Tensor, v_TGV: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        keys, values = self.cache.keys(layer.index), self.cache.values(layer.index)
        write_pages(k_TGC, keys.permute(0, 3, 1, 2), self.slots_T)
        write_pages(v_TGV, values.transpose(1, 2), self.slots_T)
        return paged_attention(
            q_THC, keys, values, self.requests, layer.scale, layer.window, layer.chunk, sinks_H
        )

    def _latent(
        self, layer: Layer, q_THC: Tensor, latent_TR: Tensor, k_rope_TC: Tensor, wkv_b: Linear,
        config: AttentionConfig,
    ) -> Tensor:  # fmt: skip
        latents, rank = self.cache.latents(layer.index), latent_TR.shape[1]
        pages = latents[:, :, None]
        write_pages(latent_TR[:, None], pages[..., :rank], self.slots_T)
        write_pages(k_rope_TC[:, None], pages[..., rank:], self.slots_T)
        w_HXR = plain_weight(wkv_b, q_THC.dtype).unflatten(0, (q_THC.shape[1], -1))
        plain = config.qk_nope_head_dim
        q_HTR = torch.bmm(q_THC[..., :plain].transpose(0, 1), w_HXR[:, :plain])
        q_THN = torch.cat([q_HTR.transpose(0, 1), q_THC[..., plain:]], -1)
        o_THR = paged_latent_attention(
            q_THN, latents, self.requests, layer.scale, rank, layer.window, layer.chunk
        )
        return torch.bmm(o_THR.transpose(0, 1), w_HXR[:, plain:].mT).transpose(0, 1)
