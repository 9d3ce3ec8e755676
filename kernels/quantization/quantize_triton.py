"""Triton form of `kernels.quantization.quantize`: every element is read once for all outputs.

A program processes a tile as large as its blocks, so that no maximum spans programs: 128x128 if
columns are requested, a strip of 32x128 for rows alone (the limit is memory bandwidth; more,
smaller programs hide latency better). Transposed data is stored through shared memory, which makes
its stores contiguous.

The maximum is taken over the bits of |x| as integers: their order is that of the values, and every
NaN compares above infinity, so one comparison finds blocks that must become NaN (a floating maximum
would drop NaNs).

Blocks that restart with every group come from a list that the device writes
(`kernels.group_schedule.schedule`). The number of programs is the maximum number of blocks; a
program without a block writes the smallest scale and no data.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8 import BLOCK, MIN_SCALE, Quantized, empty_column_major
from kernels.group_schedule import ENTRY, schedule

_STRIP = 32


def quantize_groups(
    x_RD: Tensor, dtype: torch.dtype, power_of_two: bool, rows: bool, columns: bool,
    groups: tuple[Tensor, Tensor] | None = None,
) -> tuple[Quantized | None, Quantized | None]:  # fmt: skip
    """`quantize_1x128` if `rows`, `quantize_128x1` if `columns`; one pass for both.

    groups: ends and counts, if the blocks of columns restart with every group.
    """
    assert columns or groups is None
    x_RD = x_RD if x_RD.stride(1) == 1 else x_RD.contiguous()
    (R, D), device = x_RD.shape, x_RD.device
    r, d = triton.cdiv(R, BLOCK), triton.cdiv(D, BLOCK)
    if groups is not None:
        r = R // BLOCK + len(groups[0])
    by_row = by_column = None
    if rows:
        by_row = Quantized(
            torch.empty(R, D, dtype=dtype, device=device),
            empty_column_major((R, d), torch.float32, device),
        )
    if columns:
        by_column = Quantized(
            empty_column_major((R, D), dtype, device),
            torch.empty(r, D, dtype=torch.float32, device=device),
        )
    if D and r:
        tile = BLOCK if columns else _STRIP
        blocks = None if groups is None else schedule(*groups, R, BLOCK, split=False).tiles
        _groups[(r if columns else triton.cdiv(R, tile), d)](
            x_RD, *(by_row or (None, None)), *(by_column or (None, None)), blocks, R, D,
            x_RD.stride(0),
            by_row.scales.stride(1) if by_row else 0,
            by_column.data.stride(1) if by_column else 0,
            LARGEST=torch.finfo(dtype).max, SMALLEST_SCALE=MIN_SCALE, POWER_OF_TWO=power_of_two,
            TILE=tile, STRIP=_STRIP, BLOCK=BLOCK, ENTRY=ENTRY, num_warps=8 if columns else 4,
        )  # fmt: skip
    return by_row, by_column


def quantize_blocks(
    w_ERD: Tensor, dtype: torch.dtype, power_of_two: bool
) -> tuple[Quantized, Tensor]:
    """`kernels.quantization.quantize.quantize_128x128` in one pass."""
    w_ERD = w_ERD if w_ERD.stride(2) == 1 else w_ERD.contiguous()
    (E, R, D), device = w_ERD.shape, w_ERD.device
    r, d = triton.cdiv(R, BLOCK), triton.cdiv(D, BLOCK)
    data = torch.empty(E, R, D, dtype=dtype, device=device)
    transposed = empty_column_major((E, R, D), dtype, device)
    scales = torch.empty(E, r, d, dtype=torch.float32, device=device)
    if E and R and D:
        _blocks[(r, d, E)](
            w_ERD, data, transposed, scales, R, D, w_ERD.stride(0), w_ERD.stride(1),
            transposed.stride(0), transposed.stride(2),
            LARGEST=torch.finfo(dtype).max, SMALLEST_SCALE=MIN_SCALE, POWER_OF_TWO=power_of_two,
            BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return Quantized(data, scales), transposed


@triton.jit
def magnitude_bits(x):  # type: ignore[no-untyped-def]
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def block_scale(  # type: ignore[no-untyped-def]
    bits, LARGEST: tl.constexpr, SMALLEST_SCALE: tl.constexpr, POWER_OF_TWO: tl.constexpr
):  # fmt: skip
    """amax / LARGEST rounded to nearest: LARGEST is 7 * 64 or 15 * 16, so no quotient is within
    1/30 ulp of a rounding boundary, and one correction of the product is enough."""
    amax = bits.to(tl.float32, bitcast=True)
    largest = tl.full(bits.shape, LARGEST, tl.float32)
    inverse = tl.full(bits.shape, 1 / LARGEST, tl.float32)
    scale = amax * inverse
    scale = tl.fma(tl.fma(scale, largest, -amax), -inverse, scale)
    scale = tl.maximum(scale, SMALLEST_SCALE)
    if POWER_OF_TWO:
        rounded = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = rounded.to(tl.float32, bitcast=True)
    return tl.where(bits >= 0x7F800000, float("nan"), scale)


@triton.jit
def divide(x, scale, POWER_OF_TWO: tl.constexpr):  # type: ignore[no-untyped-def]
    """x / scale rounded to nearest, in 5 instructions; the general division takes about 20.

    The reciprocal is computed once per block. `x * inverse` is within 1.5 ulp; a first correction
    by its exact remainder leaves less than 1, a second rounds correctly (Markstein, IBM J. Res.
    Dev. 34, 1990). The remainder is negated so that -0 / scale stays -0. It may underflow only if
    |x| < 2^-102, and such a quotient, at a scale of at least 2^-80, is zero in FP8 anyway.
    """
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    quotient = x * inverse
    if not POWER_OF_TWO:
        scale = tl.broadcast_to(scale, x.shape)
        minus_inverse = tl.broadcast_to(-inverse, x.shape)
        quotient = tl.fma(tl.fma(quotient, scale, -x), minus_inverse, quotient)
        quotient = tl.fma(tl.fma(quotient, scale, -x), minus_inverse, quotient)
    return quotient


@triton.jit
def _values(x_ptr, rows, columns, end, D, stride):  # type: ignore[no-untyped-def]
    inside = (rows < end)[:, None] & (columns < D)[None, :]
    at = x_ptr + rows[:, None] * stride + columns[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _groups(  # type: ignore[no-untyped-def]
    x_ptr, row_data_ptr, row_scales_ptr, column_data_ptr, column_scales_ptr, blocks_ptr, R, D,
    x_stride, row_scales_stride, column_data_stride,
    LARGEST: tl.constexpr, SMALLEST_SCALE: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    TILE: tl.constexpr, STRIP: tl.constexpr, BLOCK: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    """Quantize rows [first, end), of which those from true_end on are treated as zeros."""
    if blocks_ptr is not None:
        entry = blocks_ptr + (1 + tl.program_id(0)) * ENTRY
        first = tl.load(entry + 1).to(tl.int64)
        true_end, end = tl.load(entry + 2), tl.load(entry + 3)
    else:
        first = tl.program_id(0).to(tl.int64) * TILE
        true_end, end = R, R
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    largest = tl.zeros((STRIP, BLOCK), tl.int32)
    for start in range(0, TILE, STRIP):
        rows = first + start + tl.arange(0, STRIP)
        inside = (rows < end)[:, None] & (columns < D)[None, :]
        x = _values(x_ptr, rows, columns, true_end, D, x_stride)
        bits = magnitude_bits(x)
        if row_data_ptr is not None:
            scale = block_scale(tl.max(bits, 1), LARGEST, SMALLEST_SCALE, POWER_OF_TWO)
            data = divide(x, scale[:, None], POWER_OF_TWO).to(row_data_ptr.dtype.element_ty)
            tl.store(row_data_ptr + rows[:, None] * D + columns[None, :], data, mask=inside)
            row_scales = row_scales_ptr + tl.program_id(1).to(tl.int64) * row_scales_stride
            tl.store(row_scales + rows, scale, mask=rows < end)
        if column_data_ptr is not None:
            largest = tl.maximum(largest, bits)
    if column_data_ptr is not None:
        scale = block_scale(tl.max(largest, 0), LARGEST, SMALLEST_SCALE, POWER_OF_TWO)
        column_scales = column_scales_ptr + tl.program_id(0).to(tl.int64) * D
        tl.store(column_scales + columns, scale, mask=columns < D)
        for start in range(0, TILE, STRIP):
            rows = first + start + tl.arange(0, STRIP)
            inside = (rows < end)[:, None] & (columns < D)[None, :]
            x = _values(x_ptr, rows, columns, true_end, D, x_stride)
            data = divide(x, scale[None, :], POWER_OF_TWO)
            data = tl.trans(data.to(column_data_ptr.dtype.element_ty))
            at = column_data_ptr + columns[:, None] * column_data_stride + rows[None, :]
            tl.store(at, data, mask=tl.trans(inside))


@triton.jit
def _blocks(  # type: ignore[no-untyped-def]
    w_ptr, data_ptr, transposed_ptr, scales_ptr, R, D, w_stride_e, w_stride_r,
    transposed_stride_e, transposed_stride_d,
    LARGEST: tl.constexpr, SMALLEST_SCALE: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < R)[:, None] & (columns < D)[None, :]
    w = _values(w_ptr + expert * w_stride_e, rows, columns, R, D, w_stride_r)
    bits = tl.max(tl.max(magnitude_bits(w), 1, keep_dims=True), 0, keep_dims=True)
    scale = block_scale(bits, LARGEST, SMALLEST_SCALE, POWER_OF_TWO)
    data = divide(w, scale, POWER_OF_TWO).to(data_ptr.dtype.element_ty)
    at = data_ptr + (expert * R + rows)[:, None] * D + columns[None, :]
    tl.store(at, data, mask=inside)
    at = transposed_ptr + expert * transposed_stride_e
    at += columns[:, None] * transposed_stride_d + rows[None, :]
    tl.store(at, tl.trans(data), mask=tl.trans(inside))
    at = scales_ptr + expert * tl.num_programs(0) * tl.num_programs(1)
    at += tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(at + tl.zeros((1, 1), tl.int32), scale)
