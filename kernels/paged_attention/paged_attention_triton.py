"""Triton forms of `kernels.paged_attention.paged_attention`.

A tile of queries that share a key/value head (some query heads of some consecutive tokens of one
request) reads blocks of that head's keys and values once, through the page table, and keeps the
running maximum and sum of the softmax (FlashAttention-2, arXiv:2307.08691). Blocks start at
multiples of their size, whatever the page size; blocks without a visible key are not read.

A decode has too few queries to occupy a GPU, so its keys are divided into splits, one program
each, and a second kernel combines them ("flash decoding", Dao et al. 2023). A split has `_SPLIT`
keys, or the multiple of it that divides the keys into at most `_SPLITS`, so the division is a
function of the request's own length. Blocks and splits are processed in order, without atomics:
the result of a request has the same bits for any other requests in the batch. Only the number of
programs depends on the batch; those without a split end at once. So a captured CUDA graph can be
replayed with other lengths.

Values of keys that no query of the tile attends to are loaded as zero: a page may contain anything
there, NaN included.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gemm.gemm_fp8_triton import Target
from kernels.paged_attention.batch import PagedBatch

_SPLIT = 512
"""Keys per split of a decode."""
_SPLITS = 32
"""Maximum number of splits; beyond, splits are multiples of `_SPLIT`."""
_MOST_KEYS = 64
"""Most keys of a block; `_SPLIT` is a multiple of every block."""
_WRITTEN = 1024
"""Elements per program of `write`."""
_VARYING = ["n_requests", "n_decodes", "n_splits", "table_row"]
"""Arguments that differ between steps. Triton would compile them into the code where they are 1 or
a multiple of 16, and so compile again while requests wait."""
_LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))


class _Tile(NamedTuple):
    """Sizes of a program."""

    rows: int
    """Queries: heads times tokens."""
    keys: int
    warps: int
    stages: int


def attend(
    q_THC: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, scale: float, window: int,
    chunk: int, sinks_H: Tensor | None, shared: bool = False,
) -> Tensor:  # fmt: skip
    """`paged_attention`. shared: the values are the first columns of the keys, in memory too."""
    (T, H, C), (_, G, _, size), V = q_THC.shape, keys.shape, values.shape[3]
    B, P = batch.page_tables.shape
    out = q_THC.new_empty(T, H, V)
    if not out.numel():
        return out
    n_decodes, target = batch.n_decodes, Target.current()
    n_splits = _n_splits(P * size, min(window or P * size, chunk or P * size))
    partial = stats = out.new_empty(1, dtype=torch.float32)  # one type, for one compiled kernel
    if n_decodes and n_splits > 1:
        partial = out.new_empty(n_decodes, H, n_splits, V, dtype=torch.float32)
        stats = out.new_empty(n_decodes, H, n_splits, 2, dtype=torch.float32)
    main = V if shared else C
    model = {
        "H": H, "GROUP": H // G, "C": main, "EXTRA": C - main, "V": V, "PAGE": size,
        "WINDOW": window, "CHUNK": chunk, "SPLIT": _SPLIT, "SPLITS": _SPLITS,
        "MAIN": _block(main), "REST": _block(C - main) if C > main else 0, "VALUE": _block(V),
    }  # fmt: skip
    for is_decode in (True, False):
        n_requests = n_decodes if is_decode else B - n_decodes
        if not n_requests or (not is_decode and T == n_decodes):
            continue
        tile = _tile(is_decode, H // G, main, q_THC.dtype, target.amd)
        heads = tile.rows if is_decode else min(triton.next_power_of_2(H // G), tile.rows)
        tiles = n_requests if is_decode else (T - n_decodes) // (tile.rows // heads) + n_requests
        grid = (tiles * triton.cdiv(H // G, heads), G, n_splits if is_decode else 1)
        _attend[grid](
            q_THC, keys, values, batch.page_tables, batch.query_starts, batch.key_lengths,
            out if sinks_H is None else sinks_H, out, partial, stats, B, n_decodes, n_splits,
            scale * math.log2(math.e), *q_THC.stride()[:2], *keys.stride(), *values.stride(),
            batch.page_tables.stride(0),
            DECODE=is_decode, SINKS=sinks_H is not None, SHARED=shared, ROWS=tile.rows, HEADS=heads,
            KEYS=tile.keys, **model, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if is_decode and n_splits > 1:
            _combine[(n_decodes, H)](
                partial, stats, batch.key_lengths, out, n_splits, H=H, V=V, WINDOW=window,
                CHUNK=chunk, KEYS=tile.keys, SPLIT=_SPLIT, SPLITS=_SPLITS, VALUE=_block(V),
                num_warps=4 if V > 128 else 1,
            )  # fmt: skip
    return out


def _n_splits(n_keys: int, local: int) -> int:
    """Most splits of a decode with `n_keys` keys that attends to `local` of them, from anywhere in
    a block."""
    n_keys = min(n_keys, local + _MOST_KEYS - 1)
    return max(min(triton.cdiv(n_keys, _SPLIT), _SPLITS), 1)


def _block(width: int) -> int:
    """Columns of a block for `width`, as tensor cores require."""
    return max(triton.next_power_of_2(width), 16)


def _tile(is_decode: bool, group: int, width: int, dtype: torch.dtype, amd: bool) -> _Tile:
    """Sizes for `group` query heads per key/value head of this width, chosen so that no registers
    are spilled (`python -m scripts.kernel_table`). None is measured."""
    rows = min(max(triton.next_power_of_2(group), 16), 64) if is_decode else 64
    if dtype == torch.float32:  # without tensor cores on NVIDIA
        return _Tile(16, 32 if width <= 128 else 16, 8 if 128 < width <= 256 else 4, 1)
    if width > 256:
        return _Tile(min(rows, 32), 32, 4 if amd else 8, 1 if amd else 2)
    return _Tile(rows, _MOST_KEYS if width <= 128 and not amd else 32, 4, 1 if amd else 2)


def write(rows_TGC: Tensor, pages: Tensor, slots_T: Tensor) -> None:
    """`write_pages`."""
    (T, G, C), size = rows_TGC.shape, pages.shape[1]
    if not rows_TGC.numel():
        return
    _write[(T, triton.cdiv(G * C, _WRITTEN))](
        rows_TGC, pages, slots_T, size, G * C, C, *rows_TGC.stride(), *pages.stride(),
        BLOCK=min(_WRITTEN, triton.next_power_of_2(G * C)),
    )  # fmt: skip


@triton.jit
def _first_key(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first key to which the query at `position` attends."""
    first = position * 0
    if WINDOW:
        first = tl.maximum(position - WINDOW + 1, 0)
    if CHUNK:
        first = tl.maximum(first, position // CHUNK * CHUNK)
    return first


@triton.jit
def _split_size(n_keys, SPLIT: tl.constexpr, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys per split: the smallest multiple of SPLIT that needs at most SPLITS splits."""
    return tl.maximum(tl.cdiv(n_keys, SPLIT * SPLITS), 1) * SPLIT


@triton.jit
def _request_of(tile, starts_ptr, n_requests, first, QUERIES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The request of a tile, and the index of the tile in that request.

    Request b begins at tile (rows before it) // QUERIES + (requests before it), which leaves each
    at least as many tiles as it needs. The last request that begins at or before the tile is it.
    """
    before = tl.load(starts_ptr + first)
    low, high = first, n_requests - 1
    while low < high:
        middle = (low + high + 1) // 2
        begin = (tl.load(starts_ptr + middle) - before) // QUERIES + middle - first
        low = tl.where(begin <= tile, middle, low)
        high = tl.where(begin <= tile, high, middle - 1)
    begin = (tl.load(starts_ptr + low) - before) // QUERIES + low - first
    return low, tile - begin


@triton.jit(do_not_specialize=_VARYING)
def _attend(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, tables_ptr, starts_ptr, lengths_ptr, sinks_ptr, out_ptr, partial_ptr,
    stats_ptr, n_requests, n_decodes, n_splits, scale, q_row, q_head, k_page, k_head, k_dim,
    k_token, v_page, v_head, v_token, v_dim, table_row,
    DECODE: tl.constexpr, SINKS: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr,
    EXTRA: tl.constexpr, V: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr, MAIN: tl.constexpr,
    REST: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = ROWS // HEADS
    HEAD_BLOCKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    tile = tl.program_id(0) // HEAD_BLOCKS
    kv_head, split = tl.program_id(1), tl.program_id(2)
    if DECODE:
        request, begin_row, n_rows, done = tile, tile, 1, 0
    else:
        request, index = _request_of(tile, starts_ptr, n_requests, n_decodes, QUERIES)
        begin_row = tl.load(starts_ptr + request)
        n_rows = tl.load(starts_ptr + request + 1) - begin_row
        done = index * QUERIES
        if done >= n_rows:
            return
    length = tl.load(lengths_ptr + request)
    rows = tl.arange(0, ROWS)
    heads = tl.program_id(0) % HEAD_BLOCKS * HEADS + rows % HEADS
    tokens = done + rows // HEADS
    inside = (heads < GROUP) & (tokens < n_rows)
    first = length - n_rows + done
    positions = first + tl.minimum(rows // HEADS, n_rows - 1 - done)
    low = _first_key(tl.maximum(first, 0), WINDOW, CHUNK)
    end = tl.minimum(first + QUERIES, length)

    # the keys of this program
    begin = low // KEYS * KEYS
    stop = end
    alone = True
    if DECODE:
        size = _split_size(end - begin, SPLIT, SPLITS)
        alone = end - begin <= size
        if (split > 0) & (split * size >= end - begin):
            return
        begin += split * size
        stop = tl.minimum(begin + size, end)

    heads += kv_head * GROUP
    q_at = q_ptr + ((begin_row + tokens).to(tl.int64) * q_row + heads * q_head)[:, None]
    dims = tl.arange(0, MAIN)
    q = tl.load(q_at + dims[None, :], mask=inside[:, None] & (dims < C)[None, :], other=0.0)
    if REST:
        rest_dims = tl.arange(0, REST)
        q_mask = inside[:, None] & (rest_dims < EXTRA)[None, :]
        q_rest = tl.load(q_at + C + rest_dims[None, :], mask=q_mask, other=0.0)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if SINKS:
        if split == 0:
            sinks = tl.load(sinks_ptr + heads, mask=inside, other=0.0).to(tl.float32)
            peak = sinks * _LOG2_E
            total += 1.0
    columns = tl.arange(0, VALUE)
    acc = tl.zeros((ROWS, VALUE), tl.float32)
    table = tables_ptr + request.to(tl.int64) * table_row
    last_page = (end + PAGE - 1) // PAGE * PAGE
    k_ptr += kv_head.to(tl.int64) * k_head
    v_ptr += kv_head.to(tl.int64) * v_head

    for start in range(begin, stop, KEYS):
        start = tl.multiple_of(start, KEYS)
        at = start + tl.arange(0, KEYS)
        used = (at >= low) & (at < end)
        # whole pages, so that neighboring keys are loaded together; the excess is not visible
        loaded = used if SHARED else (at >= low // PAGE * PAGE) & (at < last_page)
        pages = tl.load(table + at // PAGE, mask=loaded, other=0).to(tl.int64)
        offsets = at % PAGE
        k_at = k_ptr + (pages * k_page + offsets * k_token)[None, :]
        k_mask = (dims < C)[:, None] & loaded[None, :]
        k = tl.load(k_at + (dims * k_dim)[:, None], mask=k_mask, other=0.0)
        scores = tl.dot(q, k, input_precision="ieee")
        if REST:
            rest_mask = (rest_dims < EXTRA)[:, None] & loaded[None, :]
            k_rest = tl.load(k_at + ((C + rest_dims) * k_dim)[:, None], mask=rest_mask, other=0.0)
            scores = tl.dot(q_rest, k_rest, scores, input_precision="ieee")
        visible = at[None, :] <= positions[:, None]
        if WINDOW:
            visible &= positions[:, None] - at[None, :] < WINDOW
        if CHUNK:
            visible &= at[None, :] >= (positions // CHUNK * CHUNK)[:, None]
        scores = tl.where(visible, scores * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        # a row without a visible key so far must not compute inf - inf
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        probs = tl.math.exp2(scores - safe[:, None])
        shrink = tl.math.exp2(peak - safe)
        total = total * shrink + tl.sum(probs, 1)
        peak = higher
        if SHARED:
            v = tl.trans(k)
        else:
            v_at = v_ptr + (pages * v_page + offsets * v_token)[:, None] + columns[None, :] * v_dim
            v = tl.load(v_at, mask=used[:, None] & (columns < V)[None, :], other=0.0)
        acc = tl.dot(probs.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")

    row_at = (begin_row + tokens).to(tl.int64) * H + heads
    mask = inside[:, None] & (columns < V)[None, :]
    if DECODE:
        if not alone:
            part = row_at * n_splits + split
            tl.store(partial_ptr + part[:, None] * V + columns[None, :], acc, mask=mask)
            tl.store(stats_ptr + part * 2, peak, mask=inside)
            tl.store(stats_ptr + part * 2 + 1, total, mask=inside)
            return
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out = out_ptr + row_at[:, None] * V + columns[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_splits"])
def _combine(  # type: ignore[no-untyped-def]
    partial_ptr, stats_ptr, lengths_ptr, out_ptr, n_splits, H: tl.constexpr, V: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
    SPLITS: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Add up the splits of a decode with more than one, in order."""
    request, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths_ptr + request)
    low = _first_key(tl.maximum(length - 1, 0), WINDOW, CHUNK)
    n_keys = length - low // KEYS * KEYS
    size = _split_size(n_keys, SPLIT, SPLITS)
    if n_keys <= size:
        return
    row = request.to(tl.int64) * H + head
    columns = tl.arange(0, VALUE)
    acc = tl.zeros((VALUE,), tl.float32)
    peak, total = float("-inf"), 0.0
    for split in range(0, tl.cdiv(n_keys, size)):
        part = row * n_splits + split
        values = tl.load(partial_ptr + part * V + columns, mask=columns < V, other=0.0)
        own, amount = tl.load(stats_ptr + part * 2), tl.load(stats_ptr + part * 2 + 1)
        higher = tl.maximum(peak, own)
        shrink, weight = tl.math.exp2(peak - higher), tl.math.exp2(own - higher)
        acc = acc * shrink + values * weight
        total = total * shrink + amount * weight
        peak = higher
    tl.store(out_ptr + row * V + columns, (acc / total).to(out_ptr.dtype.element_ty), columns < V)


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    rows_ptr, pages_ptr, slots_ptr, size, n, C, row_token, row_head, row_dim, page, token, head,
    dim, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot >= 0:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        heads, dims = at // C, at % C
        x = tl.load(rows_ptr + row * row_token + heads * row_head + dims * row_dim, mask=at < n)
        to = pages_ptr + slot // size * page + slot % size * token + heads * head + dims * dim
        tl.store(to, x.to(pages_ptr.dtype.element_ty), mask=at < n)
