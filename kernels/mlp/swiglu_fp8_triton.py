"""Triton form of the quantized `kernels.mlp.swiglu`: products' operands, written once, in FP8.

Forward: a program computes 32 rows of one block of 128 columns of h, so no maximum spans programs.
Backward: a program computes a block of 128 rows of one group and 128 columns. It processes them in
strips of rows twice: first for the maxima over columns, writing the results that are quantized
along rows; then again, from cache, for those that are quantized along columns. That recomputes a
sigmoid instead of storing three 128x128 tiles, which would not fit into registers. The sum over a
row for the gradient of its weight is made of one partial sum per program, added up afterwards:
there are no atomics, so the bits are always the same.

The grid covers the maximum number of blocks; each program computes the group of its block from the
groups' ends on the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8 import BLOCK, MIN_SCALE, Quantized, empty_column_major
from kernels.mlp.swiglu_triton import factors, gradients
from kernels.quantization.quantize_triton import (
    block_scale,
    divide,
    magnitude_bits,
    quantize_groups,
)

_STRIP = 32
_BACKWARD_STRIP = 16
"""With 32 rows the three results and their inputs do not fit into registers."""


def forward(
    gate_up_R2F: Tensor,
    weights_R: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    power_of_two: bool,
) -> Quantized:
    """`kernels.mlp.swiglu.swiglu_quantized` in one pass."""
    gate_up_R2F = gate_up_R2F.contiguous()
    R, width = gate_up_R2F.shape[0], gate_up_R2F.shape[1] // 2
    h = _empty_rows(R, width, dtype, gate_up_R2F.device)
    if h.data.numel():
        _forward[(triton.cdiv(R, _STRIP), triton.cdiv(width, BLOCK))](
            gate_up_R2F, weights_R, *h, R, width, h.scales.stride(1),
            CLAMPED=activation == "clamped_swiglu", STRIP=_STRIP, BLOCK=BLOCK,
            **_constants(dtype, power_of_two),
        )  # fmt: skip
    return h


def backward(
    grad_RF: Tensor,
    gate_up_R2F: Tensor,
    weights_R: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    power_of_two: bool,
    ends_E: Tensor | None,
    counts_E: Tensor | None,
    scales: Tensor | None,
) -> tuple[Quantized, Quantized, Quantized, Tensor]:
    """`kernels.mlp.swiglu.swiglu_backward_quantized` in one pass."""
    gate_up_R2F, grad_RF = gate_up_R2F.contiguous(), grad_RF.contiguous()
    (R, width), here = grad_RF.shape, grad_RF.device
    n_groups = 1 if ends_E is None else len(ends_E)
    blocks = triton.cdiv(R, BLOCK) if ends_E is None else R // BLOCK + n_groups
    # a block of 128 that begins in gate and ends in up spans two programs: not done here
    aligned = width % BLOCK == 0
    rows = _empty_rows(R, 2 * width, dtype, here) if aligned else None
    grad_gate_up = None if aligned else grad_RF.new_empty(R, 2 * width)
    columns = _empty_columns(R, 2 * width, blocks, dtype, here)
    h = _empty_columns(R, width, blocks, dtype, here)
    partial = None
    if weights_R is not None:
        partial = torch.zeros(triton.cdiv(width, BLOCK), R, device=here)
    if grad_RF.numel():
        _backward[(blocks, triton.cdiv(width, BLOCK))](
            grad_RF, gate_up_R2F, scales, weights_R, ends_E, counts_E,
            *(rows or (None, None)), grad_gate_up, *columns, *h, partial, R, width,
            0 if scales is None else scales.stride(0), 0 if scales is None else scales.stride(1),
            0 if rows is None else rows.scales.stride(1), columns.data.stride(1), n_groups,
            CLAMPED=activation == "clamped_swiglu", ALIGNED=aligned,
            GROUPS=triton.next_power_of_2(n_groups),
            STRIP=_BACKWARD_STRIP, BLOCK=BLOCK, num_warps=8,
            **_constants(dtype, power_of_two),
        )  # fmt: skip
    if grad_gate_up is not None:
        rows, _ = quantize_groups(grad_gate_up, dtype, power_of_two, rows=True, columns=False)
    assert rows is not None
    return rows, columns, h, grad_RF.new_empty(0) if partial is None else partial.sum(0)


def _constants(dtype: torch.dtype, power_of_two: bool) -> dict[str, float | bool]:
    return {
        "LARGEST": torch.finfo(dtype).max,
        "SMALLEST_SCALE": MIN_SCALE,
        "POWER_OF_TWO": power_of_two,
    }


def _empty_rows(R: int, D: int, dtype: torch.dtype, here: torch.device) -> Quantized:
    scales = empty_column_major((R, triton.cdiv(D, BLOCK)), torch.float32, here)
    return Quantized(torch.empty(R, D, dtype=dtype, device=here), scales)


def _empty_columns(
    R: int, D: int, blocks: int, dtype: torch.dtype, here: torch.device
) -> Quantized:
    data = empty_column_major((R, D), dtype, here)
    return Quantized(data, torch.empty(blocks, D, device=here))


@triton.jit
def _round_to(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    return x.to(dtype).to(tl.float32)


@triton.jit
def _store_rows(  # type: ignore[no-untyped-def]
    x, data_ptr, scales_ptr, block, rows, columns, inside, end, D, scales_stride,
    LARGEST: tl.constexpr, SMALLEST_SCALE: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """Store a strip quantized along its rows; `block` of their scales."""
    scale = block_scale(tl.max(magnitude_bits(x), 1), LARGEST, SMALLEST_SCALE, POWER_OF_TWO)
    data = divide(x, scale[:, None], POWER_OF_TWO).to(data_ptr.dtype.element_ty)
    tl.store(data_ptr + rows[:, None] * D + columns[None, :], data, mask=inside)
    tl.store(scales_ptr + block.to(tl.int64) * scales_stride + rows, scale, mask=rows < end)


@triton.jit
def _store_columns(  # type: ignore[no-untyped-def]
    x, data_ptr, scale, rows, columns, inside, stride, POWER_OF_TWO: tl.constexpr
):  # fmt: skip
    """Store a strip quantized with the scales of its columns, transposed."""
    data = tl.trans(divide(x, scale[None, :], POWER_OF_TWO).to(data_ptr.dtype.element_ty))
    at = data_ptr + columns[:, None].to(tl.int64) * stride + rows[None, :]
    tl.store(at, data, mask=tl.trans(inside))


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    gate_up_ptr, weights_ptr, data_ptr, scales_ptr, R, width, scales_stride,
    CLAMPED: tl.constexpr, STRIP: tl.constexpr, BLOCK: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST_SCALE: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * STRIP + tl.arange(0, STRIP)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < R)[:, None] & (columns < width)[None, :]
    at = gate_up_ptr + rows[:, None] * (2 * width) + columns[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    act, _, factor = factors(gate, up, CLAMPED)
    h = act * factor
    if weights_ptr is not None:
        h = h * tl.load(weights_ptr + rows, mask=rows < R, other=0.0)[:, None]
    h = _round_to(h, gate_up_ptr.dtype.element_ty)
    _store_rows(
        h, data_ptr, scales_ptr, tl.program_id(1), rows, columns, inside, R, width, scales_stride,
        LARGEST, SMALLEST_SCALE, POWER_OF_TWO,
    )  # fmt: skip


@triton.jit
def _place(ends_ptr, counts_ptr, n_groups, block, BLOCK: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """First row of a block, end of the true rows of its group, and end of the group."""
    groups = tl.arange(0, GROUPS)
    known = groups < n_groups
    ends = tl.load(ends_ptr + groups, mask=known, other=0).to(tl.int64)
    starts = tl.load(ends_ptr + groups - 1, mask=known & (groups > 0), other=0).to(tl.int64)
    counts = tl.load(counts_ptr + groups, mask=known, other=0).to(tl.int64)
    blocks = ((ends - starts) + (BLOCK - 1)) // BLOCK
    blocks = tl.where(known, blocks, 0)
    through = tl.cumsum(blocks, 0)
    mine = groups == tl.sum(tl.where(known & (through <= block), 1, 0))  # none: there is no block
    before = tl.sum(tl.where(mine, through - blocks, 0))
    start = tl.sum(tl.where(mine, starts, 0))
    first = start + (block - before) * BLOCK
    return first, start + tl.sum(tl.where(mine, counts, 0)), tl.sum(tl.where(mine & known, ends, 0))


@triton.jit
def _strip(  # type: ignore[no-untyped-def]
    grad_ptr, gate_up_ptr, scales_ptr, weights_ptr, rows, columns, n_true, width,
    scales_row, scales_column, CLAMPED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of gate and up, h (rounded to grad's dtype) and of the weight, of some rows."""
    inside = (rows < n_true)[:, None] & (columns < width)[None, :]
    at = rows[:, None] * (2 * width) + columns[None, :]
    gate = tl.load(gate_up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + at + width, mask=inside, other=0.0).to(tl.float32)
    if scales_ptr is not None:
        if ALIGNED:
            block = tl.program_id(1).to(tl.int64)
            at = scales_ptr + rows * scales_row + block * scales_column
            gate *= tl.load(at, mask=rows < n_true, other=0.0)[:, None]
            at += tl.num_programs(1).to(tl.int64) * scales_column
            up *= tl.load(at, mask=rows < n_true, other=0.0)[:, None]
        else:
            scales = scales_ptr + rows[:, None] * scales_row
            of_gate = (columns // BLOCK).to(tl.int64)[None, :] * scales_column
            of_up = ((columns + width) // BLOCK).to(tl.int64)[None, :] * scales_column
            gate *= tl.load(scales + of_gate, mask=inside, other=0.0)
            up *= tl.load(scales + of_up, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + rows[:, None] * width + columns[None, :], mask=inside, other=0.0)
    weight = tl.full((1, 1), 1.0, tl.float32)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + rows, mask=rows < n_true, other=0.0)[:, None]
    grad_gate, grad_up, grad_weight, h = gradients(grad.to(tl.float32), gate, up, weight, CLAMPED)
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    return _round_to(grad_gate, dtype), _round_to(grad_up, dtype), _round_to(h, dtype), grad_weight


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad_ptr, gate_up_ptr, scales_ptr, weights_ptr, ends_ptr, counts_ptr,
    row_data_ptr, row_scales_ptr, grad_gate_up_ptr, column_data_ptr, column_scales_ptr,
    h_data_ptr, h_scales_ptr, partial_ptr, R, width, scales_row, scales_column,
    row_scales_stride, column_stride, n_groups,
    CLAMPED: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr, STRIP: tl.constexpr,
    BLOCK: tl.constexpr, LARGEST: tl.constexpr, SMALLEST_SCALE: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    at_column = tl.program_id(1)
    columns = at_column * BLOCK + tl.arange(0, BLOCK)
    rows_in_all = tl.cast(R, tl.int64)  # a constant if there is one row
    first, true_end, end = block * BLOCK, rows_in_all, rows_in_all
    if ends_ptr is not None:
        first, true_end, end = _place(ends_ptr, counts_ptr, n_groups, block, BLOCK, GROUPS)
    # from here on rows count from the block's first, in 32 bits
    n_rows = tl.minimum(end - first, BLOCK).to(tl.int32)
    n_true = tl.minimum(true_end - first, BLOCK).to(tl.int32)
    grad_ptr += first * width
    gate_up_ptr += first * 2 * width
    column_data_ptr += first
    h_data_ptr += first
    if scales_ptr is not None:
        scales_ptr += first * scales_row
    if weights_ptr is not None:
        weights_ptr += first
        partial_ptr += at_column.to(tl.int64) * R + first
    if ALIGNED:
        row_data_ptr += first * 2 * width
        row_scales_ptr += first
    else:
        grad_gate_up_ptr += first * 2 * width
    gate_bits = tl.zeros((BLOCK,), tl.int32)
    up_bits = tl.zeros((BLOCK,), tl.int32)
    h_bits = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, BLOCK, STRIP):
        rows = start + tl.arange(0, STRIP)
        inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
        grad_gate, grad_up, h, grad_weight = _strip(
            grad_ptr, gate_up_ptr, scales_ptr, weights_ptr, rows, columns, n_true, width,
            scales_row, scales_column, CLAMPED, ALIGNED, BLOCK,
        )  # fmt: skip
        gate_bits = tl.maximum(gate_bits, tl.max(magnitude_bits(grad_gate), 0))
        up_bits = tl.maximum(up_bits, tl.max(magnitude_bits(grad_up), 0))
        h_bits = tl.maximum(h_bits, tl.max(magnitude_bits(h), 0))
        if weights_ptr is not None:
            tl.store(partial_ptr + rows, tl.sum(grad_weight, 1), mask=rows < n_rows)
        if ALIGNED:
            _store_rows(
                grad_gate, row_data_ptr, row_scales_ptr, at_column, rows, columns, inside, n_rows,
                2 * width, row_scales_stride, LARGEST, SMALLEST_SCALE, POWER_OF_TWO,
            )  # fmt: skip
            _store_rows(
                grad_up, row_data_ptr, row_scales_ptr, at_column + tl.num_programs(1), rows,
                columns + width, inside, n_rows, 2 * width, row_scales_stride,
                LARGEST, SMALLEST_SCALE, POWER_OF_TWO,
            )  # fmt: skip
        else:
            at = grad_gate_up_ptr + rows[:, None] * (2 * width) + columns[None, :]
            tl.store(at, grad_gate.to(grad_gate_up_ptr.dtype.element_ty), mask=inside)
            tl.store(at + width, grad_up.to(grad_gate_up_ptr.dtype.element_ty), mask=inside)
    # where there is no block, the maxima are zero and the scale is the smallest
    gate_scale = block_scale(gate_bits, LARGEST, SMALLEST_SCALE, POWER_OF_TWO)
    up_scale = block_scale(up_bits, LARGEST, SMALLEST_SCALE, POWER_OF_TWO)
    h_scale = block_scale(h_bits, LARGEST, SMALLEST_SCALE, POWER_OF_TWO)
    of_gate = column_scales_ptr + block * (2 * width) + columns
    tl.store(of_gate, gate_scale, mask=columns < width)
    tl.store(of_gate + width, up_scale, mask=columns < width)
    at = h_scales_ptr + block * width + columns
    tl.store(at, h_scale, mask=columns < width)
    for start in range(0, BLOCK, STRIP):
        rows = start + tl.arange(0, STRIP)
        inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
        grad_gate, grad_up, h, _ = _strip(
            grad_ptr, gate_up_ptr, scales_ptr, weights_ptr, rows, columns, n_true, width,
            scales_row, scales_column, CLAMPED, ALIGNED, BLOCK,
        )  # fmt: skip
        _store_columns(
            grad_gate, column_data_ptr, gate_scale, rows, columns, inside, column_stride,
            POWER_OF_TWO,
        )  # fmt: skip
        _store_columns(
            grad_up, column_data_ptr, up_scale, rows, columns + width, inside, column_stride,
            POWER_OF_TWO,
        )  # fmt: skip
        _store_columns(h, h_data_ptr, h_scale, rows, columns, inside, column_stride, POWER_OF_TWO)
