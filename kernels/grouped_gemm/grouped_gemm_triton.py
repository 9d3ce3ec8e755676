"""Triton form of `kernels.grouped_gemm.grouped_gemm` and `kernels.grouped_gemm.grouped_gemm_fp8`:
two kernels, bf16 and FP8.

The host does not know the sizes and offsets of the groups, so it launches the maximum number of
tiles for R rows in E groups, and the device computes the actual ones. For outputs by rows (NT, NN)
a small kernel first writes a list of tiles, expert after expert (`schedule`); a tile never spans
two groups, and only tiles with true rows are multiplied. Persistent programs then process the list
in the order of `kernels.gemm.gemm_fp8_triton`: 8 tiles of rows, mostly of one expert, share each
block of a weight in L2. The list ends with tiles of zero rows only; these are only written.

For outputs by experts (TN) the length of the sum differs from tile to tile, as much as the group
sizes do: there a program computes one tile, and the hardware starts the next program on any free
SM. A group's last, partial step of the sum is masked in both operands, because the following rows
may belong to another group or be NaN; if the caller guarantees zero rows up to whole steps, it is a
step like the others. Empty groups write zeros.

If the target has TMA and the operands' strides allow it, operands are loaded through descriptors:
rows of another group may then be loaded, but are never stored; a weight's descriptor has a
dimension for experts, so that values beyond one weight are zeros and not those of the next weight.
Otherwise operands are loaded through masked pointers with 64-bit offsets.

A step sums over 128 bytes of each row: 128 values of FP8, which is also what one scale covers, 64
of bf16, 32 of fp32. FP8 steps are promoted as in `kernels.gemm.gemm_fp8_triton`; bf16 accumulates
in the tensor cores throughout, which leaves registers for tiles twice as wide. fp32 avoids tf32.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.fp8 import BLOCK
from kernels.gemm.gemm_fp8_triton import TILES as FP8_TILES
from kernels.gemm.gemm_fp8_triton import Target, Tile, load, rows_contiguous, stages, store, tile_at
from kernels.group_schedule import ENTRY, schedule
from kernels.quantization.transpose_triton import to_row_major

BF16_TILES = (
    Tile(rows=128, columns=256, warps=8, programs_per_sm=1, cost=2.0),
    Tile(rows=64, columns=128, warps=4, programs_per_sm=2, cost=0.625),
)
GROUPS_TILE = FP8_TILES[0]
"""For outputs by experts, FP8 and bf16: 128x256 spills there, and experts are never narrow."""
BYTEWISE_TILE = Tile(rows=64, columns=64, warps=8, programs_per_sm=1, cost=1.0)
"""The same for FP8 if groups begin at any row: bytes are loaded one by one, and larger tiles
spill their addresses (not on AMD)."""
FP32_TILE = Tile(rows=64, columns=32, warps=8, programs_per_sm=2, cost=1.0)


def by_rows(
    a_RK: Tensor, scales_a_Rk: Tensor | None, b_ENK: Tensor, scales_b_Enk: Tensor | None,
    ends_E: Tensor, counts_E: Tensor, c_RN: Tensor,
    target: Target | None = None, tile: Tile | None = None,
) -> None:  # fmt: skip
    """`c[r] = a[r] @ b[e].T` for the rows of group e; FP8 if there are scales.

    b may be contiguous along N or K; FP8 must be contiguous along K, and is copied otherwise. No
    dimension may be 0.
    """
    (R, K), (E, N, _) = a_RK.shape, b_ENK.shape
    target = target or Target.current()
    tile = tile or choose_tile(a_RK.dtype, R, E, N, target.n_sm)
    step = BLOCK // a_RK.element_size()
    a_RK = a_RK if a_RK.stride(1) == 1 else a_RK.contiguous()
    along_k = b_ENK.stride(2) == 1
    if not along_k and scales_b_Enk is not None and b_ENK.stride(1) == 1:
        b_ENK, along_k = to_row_major(b_ENK)[:, :, :K], True
    elif not along_k and (scales_b_Enk is not None or b_ENK.stride(1) != 1):
        b_ENK, along_k = b_ENK.contiguous(), True
    b = b_ENK if along_k else b_ENK.mT
    descriptors = target.descriptors and _tma_reads(a_RK) and _tma_reads(b)
    box = [1, tile.columns, step] if along_k else [1, step, tile.columns]
    tiles = schedule(ends_E, counts_E, R, tile.rows, split=True)
    scales_a, stride_a, scales_b, strides_b = _scale_arguments(scales_a_Rk, scales_b_Enk)
    n_programs = min(
        tiles.n_most * triton.cdiv(N, tile.columns), target.n_sm * tile.programs_per_sm
    )
    a = TensorDescriptor.from_tensor(a_RK, [tile.rows, step]) if descriptors else a_RK
    _by_rows[(n_programs,)](
        a, scales_a, TensorDescriptor.from_tensor(b, box) if descriptors else b_ENK,
        scales_b, c_RN,
        tiles.tiles, N, K, a_RK.stride(0), *b_ENK.stride(), stride_a, *strides_b, c_RN.stride(0),
        FP8=scales_a_Rk is not None, ALONG_K=along_k, DESCRIPTORS=descriptors,
        ENTRY=ENTRY, BLOCK_M=tile.rows, BLOCK_N=tile.columns,
        BLOCK_K=step, GROUP=8,
        num_warps=tile.warps, num_stages=stages(tile, target, c_RN.element_size()),
    )  # fmt: skip


def by_groups(
    a_RM: Tensor, scales_a_gM: Tensor | None, b_RN: Tensor, scales_b_gN: Tensor | None,
    ends_E: Tensor, counts_E: Tensor, c_EMN: Tensor, align: int = 1,
    target: Target | None = None, tile: Tile | None = None,
) -> None:  # fmt: skip
    """`c[e] = a_e.T @ b_e` over the rows of group e; FP8 if there are scales.

    bf16 operands are contiguous along M and N, FP8 along R; others are copied. align: a number that
    divides every end; the rows of a group after its true ones are zero. No dimension may be 0.
    """
    (R, M), N, E = a_RM.shape, b_RN.shape[1], len(ends_E)
    fp8 = scales_a_gM is not None
    target = target or Target.current()
    tile = tile or _tile_of_groups(a_RM.dtype, align, target)
    step = BLOCK // a_RM.element_size()
    a, b = (_lie_along(x, along_rows=fp8) for x in (a_RM, b_RN))
    descriptors = target.descriptors and _tma_reads(a) and _tma_reads(b)
    if fp8 and align % 16:
        descriptors = False  # rows are innermost there, and boxes start at multiples of 16 bytes
    blocks, strides = None, (0, 0)
    if scales_a_gM is not None and scales_b_gN is not None:
        blocks = schedule(ends_E, counts_E, R, BLOCK, split=False).first_E
        scales_a_gM, scales_b_gN = scales_a_gM.contiguous(), scales_b_gN.contiguous()
        strides = scales_a_gM.stride(0), scales_b_gN.stride(0)
    grid = (E * triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns),)
    boxes = [[size, step] if fp8 else [step, size] for size in (tile.rows, tile.columns)]
    n_stages = stages(tile, target, c_EMN.element_size())
    if fp8 and target.amd and align % BLOCK:
        n_stages = 1  # masks of the bytes in flight fill registers there
    through = [
        TensorDescriptor.from_tensor(x, box) if descriptors else x
        for x, box in zip((a, b), boxes, strict=True)
    ]
    _by_groups[grid](
        through[0], scales_a_gM, through[1], scales_b_gN, c_EMN, ends_E, counts_E, blocks,
        M, N, a.stride(0), b.stride(0),
        *strides, c_EMN.stride(0), c_EMN.stride(1),
        FP8=fp8, ALIGN=math.gcd(align, BLOCK), DESCRIPTORS=descriptors,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=step, GROUP=8, num_warps=tile.warps,
        num_stages=n_stages,
    )  # fmt: skip


def choose_tile(dtype: torch.dtype, R: int, E: int, N: int, n_sm: int) -> Tile:
    """The tile with the least time, as for dense products. Of the group sizes only the mean is
    known, and a group wastes half a tile of rows."""
    if dtype == torch.float32:
        return FP32_TILE
    tiles = FP8_TILES if dtype.itemsize == 1 else BF16_TILES

    def time(tile: Tile) -> float:
        n_tiles = (R / tile.rows + E / 2) * triton.cdiv(N, tile.columns)
        return max(n_tiles / n_sm, 1.0) * tile.cost

    return min(tiles, key=time)


def _tile_of_groups(dtype: torch.dtype, align: int, target: Target) -> Tile:
    if dtype == torch.float32:
        return FP32_TILE
    bytewise = dtype.itemsize == 1 and align % 16 != 0 and not target.amd
    return BYTEWISE_TILE if bytewise else GROUPS_TILE


def _tma_reads(x: Tensor) -> bool:
    """Whether address and strides are multiples of 16 bytes, and the last dimension is
    contiguous."""
    whole = (stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(whole)


def _lie_along(x_RD: Tensor, along_rows: bool) -> Tensor:
    """x, or its transpose if rows are to be innermost; a copy if its memory order differs."""
    x = x_RD.T if along_rows else x_RD
    return x if x.stride(1) == 1 else x.contiguous()


def _scale_arguments(
    scales_a_Rk: Tensor | None, scales_b_Enk: Tensor | None
) -> tuple[Tensor | None, int, Tensor | None, tuple[int, ...]]:
    if scales_a_Rk is None or scales_b_Enk is None:
        return None, 0, None, (0, 0, 0)
    scales_a_Rk = rows_contiguous(scales_a_Rk)
    return scales_a_Rk, scales_a_Rk.stride(1), scales_b_Enk, scales_b_Enk.stride()


@triton.jit
def _by_rows(  # type: ignore[no-untyped-def]
    a, scales_a_ptr, b, scales_b_ptr, c_ptr, tiles_ptr, N, K,
    a_stride_m, b_stride_e, b_stride_n, b_stride_k, scales_a_stride_k,
    scales_b_stride_e, scales_b_stride_n, scales_b_stride_k, c_stride_m,
    FP8: tl.constexpr, ALONG_K: tl.constexpr, DESCRIPTORS: tl.constexpr, ENTRY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.load(tiles_ptr), tl.cdiv(N, BLOCK_N)
    first, n_programs = tl.program_id(0), tl.num_programs(0)
    for tile in tl.range(first, tiles_m * tiles_n, n_programs, flatten=DESCRIPTORS and ALONG_K):
        m, n = tile_at(tile, tiles_m, tiles_n, GROUP)
        entry = tiles_ptr + (1 + m) * ENTRY
        expert, row, true_end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        column = n * BLOCK_N
        rows = row + tl.arange(0, BLOCK_M)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, tl.cdiv(K, BLOCK_K)):
            block_a = load(a, row, BLOCK_M, true_end, k, K, a_stride_m, DESCRIPTORS, BLOCK_K)
            block_b = _weight(
                b, expert, column, BLOCK_N, N, k, K, b_stride_e, b_stride_n, b_stride_k,
                ALONG_K, DESCRIPTORS, BLOCK_K,
            )  # fmt: skip
            if FP8:
                scales_a = scales_a_ptr + tl.cast(k, tl.int64) * scales_a_stride_k
                scale_b = scales_b_ptr + tl.cast(expert, tl.int64) * scales_b_stride_e
                scale_b += column // 128 * scales_b_stride_n + k * scales_b_stride_k
                scale = tl.load(scales_a + rows, mask=rows < true_end, other=0.0)
                total += tl.dot(block_a, block_b) * (scale * tl.load(scale_b))[:, None]
            else:
                total = tl.dot(block_a, block_b, total, input_precision="ieee")
        total = tl.where((rows < true_end)[:, None], total, 0.0)
        store(c_ptr, total, row, column, tl.load(entry + 3), N, c_stride_m)
    for tile in tl.range(first, tl.load(tiles_ptr + 1) * tiles_n, n_programs):
        entry = tiles_ptr + (1 + tiles_m + tile // tiles_n) * ENTRY
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        row, end, column = tl.load(entry + 1), tl.load(entry + 3), tile % tiles_n * BLOCK_N
        store(c_ptr, zeros, row, column, end, N, c_stride_m)


@triton.jit
def _weight(  # type: ignore[no-untyped-def]
    b, expert, column, BLOCK_N: tl.constexpr, N, k, K, stride_e, stride_n, stride_k,
    ALONG_K: tl.constexpr, DESCRIPTORS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_K, BLOCK_N]`: step k of a weight for the output's columns, zero outside the
    weight."""
    if DESCRIPTORS:
        if ALONG_K:
            block = b.load([expert, column, k * BLOCK_K]).reshape(BLOCK_N, BLOCK_K).T
        else:
            block = b.load([expert, k * BLOCK_K, column]).reshape(BLOCK_K, BLOCK_N)
    else:
        along, columns = k * BLOCK_K + tl.arange(0, BLOCK_K), column + tl.arange(0, BLOCK_N)
        inside = (along < K)[:, None] & (columns < N)[None, :]
        at = b + tl.cast(expert, tl.int64) * stride_e + along.to(tl.int64)[:, None] * stride_k
        block = tl.load(at + columns.to(tl.int64)[None, :] * stride_n, mask=inside, other=0.0)
    return block


@triton.jit
def _by_groups(  # type: ignore[no-untyped-def]
    a, scales_a_ptr, b, scales_b_ptr, c_ptr, ends_ptr, counts_ptr, blocks_ptr,
    M, N, a_stride, b_stride, scales_a_stride, scales_b_stride, c_stride_e, c_stride_m,
    FP8: tl.constexpr, ALIGN: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // (tiles_m * tiles_n)
    m, n = tile_at(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0).to(tl.int32)
    count = tl.load(counts_ptr + expert).to(tl.int32)
    start = tl.multiple_of(start, ALIGN)
    end = start + count
    if FP8:
        block = tl.load(blocks_ptr + expert).to(tl.int64)
        scales_a_ptr += block * scales_a_stride
        scales_b_ptr += block * scales_b_stride
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    WHOLE_STEPS: tl.constexpr = ALIGN % BLOCK_K == 0
    LAST_APART: tl.constexpr = DESCRIPTORS and not WHOLE_STEPS
    MASKED: tl.constexpr = not DESCRIPTORS and not WHOLE_STEPS
    whole = count // BLOCK_K if LAST_APART else tl.cdiv(count, BLOCK_K)
    for step in range(0, whole):
        row = start + step * BLOCK_K
        block_a = _part(a, row, end, m, M, a_stride, FP8, DESCRIPTORS, MASKED, BLOCK_M, BLOCK_K)
        block_b = _part(b, row, end, n, N, b_stride, FP8, DESCRIPTORS, MASKED, BLOCK_N, BLOCK_K)
        total = _add(
            total, block_a, block_b, scales_a_ptr, scales_b_ptr, step, m, M, n, N,
            scales_a_stride, scales_b_stride, FP8, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if LAST_APART:
        if count % BLOCK_K != 0:
            row = start + whole * BLOCK_K
            block_a = _part(a, row, end, m, M, a_stride, FP8, True, True, BLOCK_M, BLOCK_K)
            block_b = _part(b, row, end, n, N, b_stride, FP8, True, True, BLOCK_N, BLOCK_K)
            total = _add(
                total, block_a, block_b, scales_a_ptr, scales_b_ptr, whole, m, M, n, N,
                scales_a_stride, scales_b_stride, FP8, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    c_ptr += tl.cast(expert, tl.int64) * c_stride_e
    store(c_ptr, total, m * BLOCK_M, n * BLOCK_N, M, N, c_stride_m)


@triton.jit
def _part(  # type: ignore[no-untyped-def]
    x, row, end, tile, D, stride, ROWS_INNERMOST: tl.constexpr, DESCRIPTORS: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_D, BLOCK_K]`: some columns of `BLOCK_K` rows; if masked, zero from row `end` on."""
    rows, columns = row + tl.arange(0, BLOCK_K), tile * BLOCK_D + tl.arange(0, BLOCK_D)
    if DESCRIPTORS:
        if ROWS_INNERMOST:
            block = x.load([tile * BLOCK_D, row])
        else:
            block = x.load([row, tile * BLOCK_D]).T
        if MASKED:
            block = tl.where((rows < end)[None, :], block, tl.zeros_like(block))
    else:
        if ROWS_INNERMOST:
            at = x + columns.to(tl.int64)[:, None] * stride + rows[None, :]
        else:
            at = x + columns[:, None] + rows.to(tl.int64)[None, :] * stride
        inside = (columns < D)[:, None]
        if MASKED:
            inside = inside & (rows < end)[None, :]
        block = tl.load(at, mask=inside, other=0.0)
    return block


@triton.jit
def _add(  # type: ignore[no-untyped-def]
    total, block_a, block_b, scales_a_ptr, scales_b_ptr, step, m, M, n, N,
    scales_a_stride, scales_b_stride, FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One step of the sum over rows."""
    if FP8:
        rows, columns = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
        scales_a = scales_a_ptr + tl.cast(step, tl.int64) * scales_a_stride
        scales_b = scales_b_ptr + tl.cast(step, tl.int64) * scales_b_stride
        scale_a = tl.load(scales_a + rows, mask=rows < M, other=0.0)
        product = tl.dot(block_a, block_b.T)
        scale_b = tl.load(scales_b + columns, mask=columns < N, other=0.0)
        total += product * scale_a[:, None] * scale_b[None, :]
    else:
        total = tl.dot(block_a, block_b.T, total, input_precision="ieee")
    return total
