"""The attention core of serving: keys and values live in pages.

Of the tokens of a step, the first rows are decodes (one token each) and the others are chunks of
prompts. Decodes share one call: their pages are gathered into a padded `[B, L]` batch, and since
each has a single query, the query heads of a group stand where queries usually stand, so grouped
heads need no repetition. A chunk attends by itself, to its own tokens and to those before.

All index tensors are made once per step and used by every layer. Gathering copies the keys; a
kernel that reads pages in place can take this object's place without any change elsewhere.

T tokens of the step, B decodes, L longest of them, H query heads, G key/value heads, C head width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import Layer
from serve.cache.kv_cache import KvCache
from serve.engine.scheduler import Chunk


class PagedAttention:
    """An `AttentionCore` for one step over `batch`, whose chunks of length 1 come first."""

    def __init__(self, cache: KvCache, batch: Sequence[Chunk]) -> None:
        self.cache = cache
        self.device = cache.pool.device
        decodes = [chunk for chunk in batch if chunk.length == 1]
        assert list(batch[: len(decodes)]) == decodes
        self.n_decodes = len(decodes)
        written = []
        if decodes:
            self._prepare_decodes(decodes)
            written.append(self.own_B)
        self.prefills = [self._prepare_prefill(chunk) for chunk in batch[self.n_decodes :]]
        written += [slots_L[-n:] for n, slots_L, _ in self.prefills]
        self.written_T = torch.cat(written)

    def __call__(
        self, layer: Layer, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        assert sinks_H is None and not layer.window and not layer.chunk, "refused at the start"
        keys, values = self.cache.keys(layer.index), self.cache.values(layer.index)
        keys.index_copy_(0, self.written_T, k_TGC)
        values.index_copy_(0, self.written_T, v_TGC)
        o_THC = torch.empty_like(q_THC)
        row = self.n_decodes
        if row:
            o_THC[:row] = self._decode(q_THC[:row], keys, values, layer.scale)
        for n, slots_L, mask_nL in self.prefills:
            rows = slice(row, row + n)
            if mask_nL is None:  # nothing comes before: no need to read the cache
                k_LGC, v_LGC = k_TGC[rows], v_TGC[rows]
            else:
                k_LGC, v_LGC = keys.index_select(0, slots_L), values.index_select(0, slots_L)
            o_THC[rows] = _attend(q_THC[rows], k_LGC, v_LGC, mask_nL, layer.scale)
            row += n
        return o_THC

    def _prepare_decodes(self, decodes: Sequence[Chunk]) -> None:
        size = self.cache.page_size
        longest = max(chunk.end for chunk in decodes)
        width = self.cache.pages_for(longest)
        table = [_padded(chunk.request.pages, width) for chunk in decodes]
        pages_BP = torch.tensor(table, device=self.device)
        ends_B1 = torch.tensor([[chunk.end] for chunk in decodes], device=self.device)
        offsets = torch.arange(size, device=self.device)
        slots_BL = (pages_BP[:, :, None] * size + offsets).flatten(1)[:, :longest]
        outside_BL = torch.arange(longest, device=self.device) >= ends_B1
        # the null page is zero; what a page holds beyond its owner's tokens may be anything
        self.slots_BL = slots_BL.masked_fill(outside_BL, 0)
        self.own_B = slots_BL.gather(1, ends_B1 - 1).squeeze(1)
        mask_BL = torch.zeros(outside_BL.shape, dtype=self.cache.pool.dtype, device=self.device)
        self.mask_B11L = mask_BL.masked_fill_(outside_BL, -torch.inf)[:, None, None]

    def _decode(self, q_BHC: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        B, L = self.slots_BL.shape
        G, C = keys.shape[1:]
        slots = self.slots_BL.flatten()
        k_BGLC = keys.index_select(0, slots).view(B, L, G, C).transpose(1, 2)
        v_BGLC = values.index_select(0, slots).view(B, L, G, C).transpose(1, 2)
        q = q_BHC.view(B, G, -1, C)
        o = F.scaled_dot_product_attention(q, k_BGLC, v_BGLC, attn_mask=self.mask_B11L, scale=scale)
        return o.reshape(B, -1, C)

    def _prepare_prefill(self, chunk: Chunk) -> tuple[int, Tensor, Tensor | None]:
        """Number of queries n, slots of all keys `[L]`, mask `[n, L]` (None: causal, L = n)."""
        size = self.cache.page_size
        pages = torch.tensor(chunk.request.pages[: self.cache.pages_for(chunk.end)])
        slots_L = (pages[:, None] * size + torch.arange(size)).flatten()[: chunk.end]
        mask_nL = None
        if chunk.start:
            mask_nL = torch.ones(chunk.length, chunk.end, dtype=torch.bool, device=self.device)
            mask_nL = mask_nL.tril(chunk.start)
        return chunk.length, slots_L.to(self.device), mask_nL


def _attend(
    q_nHC: Tensor, k_LGC: Tensor, v_LGC: Tensor, mask_nL: Tensor | None, scale: float
) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_nHC, k_LGC, v_LGC))
    o = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask_nL,
        is_causal=mask_nL is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return o[0].transpose(0, 1)


def _padded(pages: Sequence[int], width: int) -> list[int]:
    return [*pages[:width], *[0] * (width - len(pages))]
