"""Attention of a step's tokens over the pages of a KV cache, and writing to these pages.

A request's keys and values are in pages of `size` tokens, in any order; a row of its page table
lists them (PagedAttention, arXiv:2309.06180). The kernels read the pages in place. The first
`n_decodes` requests of a batch have one token each, the others any number of them, with any number
of keys from earlier steps before them.

Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) has one shared key per
token, the latent with its rotated part, and the latent is also the value: `paged_latent_attention`
computes the absorbed form, in which queries are already multiplied by the projection of the keys.

A query's result is a function of its own request: of its position, of its keys, and, in the last
bits, of whether it is one of the decodes. It does not depend on the other requests.

Shapes: T tokens of B requests, H query heads, G key/value heads, C head width, V value width, N
width of a latent with its rotated part, R width of the latent, P pages per row of the page table.
"""

import torch
from torch import Tensor

from kernels import device
from kernels.paged_attention.batch import PagedBatch


def paged_attention(
    q_THC: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: PagedBatch,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Softmax attention, `[T, H, V]` in the dtype of q. Raises ValueError if shapes or dtypes do
    not match.

    Args:
        q_THC: Queries; the last dimension must be contiguous. fp32 or bf16, as the cache.
        keys: `[pages, G, C, size]`, any strides. G must divide H.
        values: `[pages, G, size, V]`, any strides.
        batch: The requests.
        scale: Factor on the logits.
        window: Number of keys to which a query attends, its own included. 0: all.
        chunk: Size of the chunks of positions within which queries attend. 0: all.
        sinks_H: Logits without values that the softmax includes (GPT-OSS), or None.
    """
    _check(q_THC, keys, values, batch, sinks_H)
    if not device.on_accelerator(q_THC):
        return paged_attention_reference(q_THC, keys, values, batch, scale, window, chunk, sinks_H)
    from kernels.paged_attention.paged_attention_triton import attend

    with device.launching_on(q_THC):
        return attend(q_THC, keys, values, batch, scale, window, chunk, sinks_H)


def paged_attention_reference(
    q_THC: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: PagedBatch,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Plain-torch form of `paged_attention`, in fp32: one request after another."""
    (_, H, C), G, V = q_THC.shape, keys.shape[1], values.shape[3]
    out_THV = q_THC.new_zeros(*q_THC.shape[:2], V)
    starts, lengths = batch.query_starts.tolist(), batch.key_lengths.tolist()
    for b, end in enumerate(lengths):
        rows = slice(starts[b], starts[b + 1])
        n = rows.stop - rows.start
        if not n or not end:
            continue
        first = max(end - n - window + 1, 0) if window else 0
        first = (end - n) // chunk * chunk if chunk else first
        positions = torch.arange(first, end, device=q_THC.device)
        pages = batch.page_tables[b, positions // keys.shape[3]].long()
        offsets = positions % keys.shape[3]
        k_lGC, v_lGV = keys[pages, :, :, offsets].float(), values[pages, :, offsets].float()
        queries = positions[-n:, None]
        visible_nl = positions <= queries
        if window:
            visible_nl &= queries - positions < window
        if chunk:
            visible_nl &= queries // chunk == positions // chunk
        q_nGMC = q_THC[rows].float().view(n, G, H // G, C)
        scores = torch.einsum("ngmc,lgc->gmnl", q_nGMC, k_lGC) * scale
        scores = scores.masked_fill(~visible_nl, float("-inf"))
        if sinks_H is not None:
            sinks = sinks_H.float().view(G, H // G, 1, 1).expand(-1, -1, n, 1)
            scores = torch.cat([scores, sinks], -1)
        probs = scores.softmax(-1)[..., : end - first]
        out_THV[rows] = (
            torch.einsum("gmnl,lgv->ngmv", probs, v_lGV).reshape(n, H, V).to(q_THC.dtype)
        )
    return out_THV


def paged_latent_attention(
    q_THN: Tensor, latents: Tensor, batch: PagedBatch, scale: float, rank: int,
    window: int = 0, chunk: int = 0,
) -> Tensor:  # fmt: skip
    """Attention of all heads over one shared key per token, whose first `rank` numbers are also
    the value: `[T, H, R]`. Raises ValueError if shapes or dtypes do not match.

    latents: `[pages, size, N]`. The other arguments are those of `paged_attention`.
    """
    keys, values = latents[:, None].transpose(2, 3), latents[:, None, :, :rank]
    _check(q_THN, keys, values, batch, None)
    if not device.on_accelerator(q_THN):
        return paged_latent_attention_reference(q_THN, latents, batch, scale, rank, window, chunk)
    from kernels.paged_attention.paged_attention_triton import attend

    with device.launching_on(q_THN):
        return attend(q_THN, keys, values, batch, scale, window, chunk, None, shared=True)


def paged_latent_attention_reference(
    q_THN: Tensor, latents: Tensor, batch: PagedBatch, scale: float, rank: int,
    window: int = 0, chunk: int = 0,
) -> Tensor:  # fmt: skip
    """Plain-torch form of `paged_latent_attention`."""
    keys, values = latents[:, None].transpose(2, 3), latents[:, None, :, :rank]
    return paged_attention_reference(q_THN, keys, values, batch, scale, window, chunk)


def write_pages(rows_TGC: Tensor, pages: Tensor, slots_T: Tensor) -> None:
    """Write the rows of tokens to their slots, in place.

    rows_TGC: any strides. pages: `[pages, size, G, C]`, any strides: a view of the cache.
    slots_T: int64, page * size + offset of each token, all different; negative: not written.
    """
    if rows_TGC.shape[1:] != pages.shape[2:] or slots_T.shape != rows_TGC.shape[:1]:
        raise ValueError(
            f"write_pages: rows are {list(rows_TGC.shape)} and slots {list(slots_T.shape)} for "
            f"pages of {list(pages.shape)}"
        )
    if not device.on_accelerator(rows_TGC):
        write_pages_reference(rows_TGC, pages, slots_T)
        return
    from kernels.paged_attention.paged_attention_triton import write

    with device.launching_on(rows_TGC):
        write(rows_TGC, pages, slots_T)


def write_pages_reference(rows_TGC: Tensor, pages: Tensor, slots_T: Tensor) -> None:
    """Plain-torch form of `write_pages`."""
    written, size = slots_T >= 0, pages.shape[1]
    slots = slots_T[written]
    pages[slots // size, slots % size] = rows_TGC[written].to(pages.dtype)


def _check(
    q_THC: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, sinks_H: Tensor | None
) -> None:
    (_, H, C), (n_pages, G, width, size) = q_THC.shape, keys.shape
    B, problem = len(batch.key_lengths), None
    if width != C or values.shape[:3] != (n_pages, G, size) or H % G:
        problem = (
            f"queries are {list(q_THC.shape)}, keys {list(keys.shape)}, values {list(values.shape)}"
        )
    elif not q_THC.dtype == keys.dtype == values.dtype or q_THC.dtype not in _DTYPES:
        problem = f"queries are {q_THC.dtype}, the cache {keys.dtype}; both fp32 or bf16"
    elif q_THC.stride(2) != 1 and C > 1:
        problem = "the last dimension of the queries must be contiguous"
    elif len(batch.page_tables) != B or batch.query_starts.shape != (B + 1,):
        problem = (
            f"{B} key lengths, {len(batch.page_tables)} page tables, "
            f"{len(batch.query_starts)} query starts"
        )
    elif not 0 <= batch.n_decodes <= B:
        problem = f"{batch.n_decodes} decodes of {B} requests"
    elif sinks_H is not None and sinks_H.shape != (H,):
        problem = f"sinks are {list(sinks_H.shape)}, must be [{H}]"
    if problem:
        raise ValueError(f"paged attention: {problem}")


_DTYPES = (torch.float32, torch.bfloat16)
