"""Triton forms of `kernels.moe.permute`.

The permutation takes two launches. The first computes the histogram of every chunk of rows and
every row's rank among the rows of its expert in that chunk: within a tile of rows by comparing all
pairs, across tiles by a running histogram. The second sums the histograms before each chunk, which
gives the chunk's first slots, and writes both directions. All values are integers that a single
program computes, so the result does not depend on the order of execution.

Moving rows is limited by bandwidth, so each element is read once: as torch operations the gather
would read a token K times, and the sum would write and read K rows of a token in between. A
program processes a few tokens and a block of their columns; rows of width one (routing weights)
are processed a thousand at a time. Sums are in fp32 in the order of choices. The programs that copy
are followed by programs that search for empty slots and zero them. Row offsets are 64-bit; numbers
of rows are 32-bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 64
"""Rows that are compared with each other."""
_TILES = 16
"""Minimum number of tiles in a chunk."""
_MOST_CHUNKS = 512
"""Maximum number of chunks, whose histograms every program reads."""
_BYTES = 4096
"""Bytes of a row per program: two vectors of 16 bytes per thread."""
_SLOTS = 64
"""Slots per program that searches for empty ones."""


def permutation(
    ids_R: Tensor, n_experts: int, align: int, n_slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Order, inverse, ends and counts of `kernels.moe.permute.Permutation`."""
    ids_R, n_rows = ids_R.contiguous(), len(ids_R)
    if not n_rows:
        nothing = [ids_R.new_zeros(n_experts) for _ in range(2)]
        return ids_R.new_full((n_slots,), -1), torch.empty_like(ids_R), nothing[0], nothing[1]
    rank_R, histograms = ranks(ids_R, n_experts)
    order_P, ends_E, counts_E = places(ids_R, rank_R, histograms, n_experts, align, n_slots)
    return order_P, rank_R, ends_E, counts_E


def ranks(ids_R: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """The first launch: every row's rank within its chunk, and the chunks' histograms."""
    n_rows, width = len(ids_R), triton.next_power_of_2(n_experts)
    n_tiles = _tiles(n_rows)
    n_chunks = triton.cdiv(n_rows, n_tiles * _TILE)
    rank_R = torch.empty_like(ids_R)
    histograms = ids_R.new_empty(n_chunks, width, dtype=torch.int32)
    _rank[(n_chunks,)](
        ids_R, rank_R, histograms, n_rows, n_experts, n_tiles,
        E=width, TILE=_TILE, num_warps=_warps(width),
    )  # fmt: skip
    return rank_R, histograms


def places(
    ids_R: Tensor, rank_R: Tensor, histograms: Tensor, n_experts: int, align: int, n_slots: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The second launch: converts ranks to slots in place; returns order, ends and counts."""
    order_P = ids_R.new_empty(n_slots)
    ends_E, counts_E = ids_R.new_empty(n_experts), ids_R.new_empty(n_experts)
    (n_chunks, width), n_rows = histograms.shape, len(ids_R)
    _place[(n_chunks,)](
        ids_R, histograms, order_P, rank_R, ends_E, counts_E,
        n_rows, n_slots, n_experts, _tiles(n_rows), n_chunks, align,
        E=width, TILE=_TILE, CHUNKS=max(1, 2048 // width), GAP=triton.next_power_of_2(align),
        num_warps=_warps(width),
    )  # fmt: skip
    return order_P, ends_E, counts_E


def _tiles(n_rows: int) -> int:
    """Tiles of rows in a chunk."""
    return max(_TILES, triton.cdiv(n_rows, _MOST_CHUNKS * _TILE))


def _warps(width: int) -> int:
    return 4 if width <= 1024 else 8


def gather(x_TD: Tensor, order_P: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
    """`kernels.moe.permute.gather_rows` without autograd."""
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    (n_tokens, width), n_slots = x_TD.shape, len(order_P)
    rows_PD = x_TD.new_empty(n_slots, width)
    if rows_PD.numel():
        tokens, block = _tile(width, x_TD.element_size())
        slots = max(_SLOTS, tokens)
        copying = triton.cdiv(n_tokens, tokens)
        _gather[(copying + triton.cdiv(n_slots, slots), triton.cdiv(width, block))](
            x_TD, order_P, inverse_R, rows_PD, n_tokens, n_slots, width, x_TD.stride(0), copying,
            TOP_K=top_k, TOKENS=tokens, SLOTS=slots, BLOCK=block,
        )  # fmt: skip
    return rows_PD


def combine(rows_PD: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
    """`kernels.moe.permute.combine_rows` without autograd."""
    rows_PD = rows_PD if rows_PD.stride(1) == 1 else rows_PD.contiguous()
    n_tokens, width = len(inverse_R) // top_k, rows_PD.shape[1]
    y_TD = rows_PD.new_empty(n_tokens, width)
    if y_TD.numel():
        tokens, block = _tile(width, rows_PD.element_size())
        _combine[(triton.cdiv(n_tokens, tokens), triton.cdiv(width, block))](
            rows_PD, inverse_R, y_TD, n_tokens, width, rows_PD.stride(0),
            TOP_K=top_k, TOKENS=tokens, BLOCK=block,
        )  # fmt: skip
    return y_TD


def _tile(width: int, element_size: int) -> tuple[int, int]:
    """Tokens and columns of a program."""
    block = min(_BYTES // element_size, triton.next_power_of_2(width))
    return max(1, 1024 // block), block


@triton.jit
def _rank(  # type: ignore[no-untyped-def]
    ids_ptr, rank_ptr, histogram_ptr, n_rows, n_experts, n_tiles,
    E: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, TILE)
    seen = tl.zeros((E,), tl.int32)
    for tile in range(n_tiles):
        row = (chunk * n_tiles + tile) * TILE + place
        expert = tl.load(ids_ptr + row, mask=row < n_rows, other=n_experts).to(tl.int32)
        named = expert < n_experts
        expert = tl.where(named, expert, 0)
        same = (expert[:, None] == expert[None, :]) & named[None, :]
        rank = tl.sum((same & (place[None, :] < place[:, None])).to(tl.int32), 1)
        rank += tl.gather(seen, expert, 0)
        tl.store(rank_ptr + row, rank.to(tl.int64), mask=row < n_rows)
        seen += tl.histogram(expert, E, mask=named)
    tl.store(histogram_ptr + chunk * E + tl.arange(0, E), seen)


@triton.jit
def _place(  # type: ignore[no-untyped-def]
    ids_ptr, histogram_ptr, order_ptr, inverse_ptr, ends_ptr, counts_ptr,
    n_rows, n_slots, n_experts, n_tiles, n_chunks, align,
    E: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr, GAP: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    experts = tl.arange(0, E)
    count, before = tl.zeros((E,), tl.int32), tl.zeros((E,), tl.int32)
    for first in range(0, n_chunks, CHUNKS):
        chunks = first + tl.arange(0, CHUNKS)
        at = histogram_ptr + chunks[:, None] * E + experts[None, :]
        part = tl.load(at, mask=(chunks < n_chunks)[:, None], other=0)
        count += tl.sum(part, 0)
        before += tl.sum(tl.where((chunks < chunk)[:, None], part, 0), 0)
    padded = (count + align - 1) // align * align
    end = tl.cumsum(padded, 0)
    start = end - padded
    if chunk == 0:
        tl.store(ends_ptr + experts, end.to(tl.int64), mask=experts < n_experts)
        tl.store(counts_ptr + experts, count.to(tl.int64), mask=experts < n_experts)
    begin = start + before
    for tile in range(n_tiles):
        row = (chunk.to(tl.int64) * n_tiles + tile) * TILE + tl.arange(0, TILE)
        expert = tl.load(ids_ptr + row, mask=row < n_rows, other=n_experts).to(tl.int32)
        named = expert < n_experts
        slot = tl.load(inverse_ptr + row, mask=named, other=0)
        slot += tl.gather(begin, tl.where(named, expert, 0), 0)
        tl.store(inverse_ptr + row, tl.where(named, slot, -1), mask=row < n_rows)
        tl.store(order_ptr + slot, row, mask=named & (slot < n_slots))
    if GAP > 1:
        for e in range(chunk, n_experts, tl.num_programs(0)):
            this = experts == e
            slots = tl.sum(tl.where(this, start + count, 0), 0) + tl.arange(0, GAP)
            nothing = tl.full((GAP,), -1, tl.int64)
            tl.store(order_ptr + slots, nothing, mask=slots < tl.sum(tl.where(this, end, 0), 0))
    last = tl.max(end, 0)
    for first in range(last + chunk * TILE, n_slots, tl.num_programs(0) * TILE):
        slots = first + tl.arange(0, TILE)
        tl.store(order_ptr + slots, tl.full((TILE,), -1, tl.int64), mask=slots < n_slots)


@triton.jit
def _gather(  # type: ignore[no-untyped-def]
    x_ptr, order_ptr, inverse_ptr, rows_ptr, n_tokens, n_slots, width, x_stride, copying,
    TOP_K: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (columns < width)[None, :]
    if program < copying:
        token = program * TOKENS + tl.arange(0, TOKENS)
        there = token < n_tokens
        at = x_ptr + token[:, None] * x_stride + columns[None, :]
        x = tl.load(at, mask=there[:, None] & inside)
        for k in tl.static_range(TOP_K):
            slot = tl.load(inverse_ptr + token * TOP_K + k, mask=there, other=-1)
            at = rows_ptr + slot[:, None] * width + columns[None, :]
            tl.store(at, x, mask=(slot >= 0)[:, None] & inside)
    else:
        first = (program - copying) * SLOTS
        slots = first + tl.arange(0, SLOTS)
        order = tl.load(order_ptr + slots, mask=slots < n_slots, other=0)
        if tl.min(order, 0) < 0:
            nothing = tl.zeros((TOKENS, BLOCK), rows_ptr.dtype.element_ty)
            for start in range(0, SLOTS, TOKENS):
                some = first + start + tl.arange(0, TOKENS)
                empty = tl.load(order_ptr + some, mask=some < n_slots, other=0) < 0
                to = rows_ptr + some[:, None] * width + columns[None, :]
                tl.store(to, nothing, mask=empty[:, None] & inside)


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    rows_ptr, inverse_ptr, y_ptr, n_tokens, width, rows_stride,
    TOP_K: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there, inside = token < n_tokens, (columns < width)[None, :]
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for k in tl.static_range(TOP_K):
        slot = tl.load(inverse_ptr + token * TOP_K + k, mask=there, other=-1)
        at = rows_ptr + slot[:, None] * rows_stride + columns[None, :]
        total += tl.load(at, mask=(slot >= 0)[:, None] & inside, other=0.0).to(tl.float32)
    at = y_ptr + token[:, None] * width + columns[None, :]
    tl.store(at, total.to(y_ptr.dtype.element_ty), mask=there[:, None] & inside)
