"""Quantization to FP8 with a scale per block: `x ~ data * scale`.

Why blocks: e4m3 spans 448 down to 2^-9, five decades less than bf16. With one scale per tensor, a
single outlier makes all other values zero; one scale per 128 values limits that to the block
(DeepSeek-V3, arXiv:2412.19437, section 3.3). Activations and gradients have a scale per 1x128 along
the dimension that a product sums over, weights per 128x128: one scale per block of the product and
no second copy of scales for the transposed product. Gradients are e4m3 too: with such local scales
more mantissa is more useful than e5m2's range.

The order of operations is fixed, so every device produces the same bits: in fp32, `scale = amax /
448` and `data = x / scale`, both divisions rounded to nearest, then one rounding to FP8.
`power_of_two` rounds the scale up to a power of two, which makes the division exact (the format of
Blackwell's MX scales). Scales are at least 2^-80, so values below 2^-90 become zero. An infinity or
a NaN makes its block NaN, data and scale, since e4m3 has no infinity and a finite number would hide
it. Blocks at the edges may be partial; the grid of scales is rounded up.

Memory layouts follow the readers. FP8 tensor cores of Hopper read only operands that are contiguous
along the summed dimension, so `128x1` data (summed over rows, for weight gradients) is stored
transposed, its stride padded to 16 bytes for TMA. Scales are column-major if a GEMM tile reads 128
rows of them: call `.contiguous()` before sending rows to other ranks.

In a grouped product the sum over rows ends with its group, so there the 128x1 blocks restart with
every group (`quantize_128x1_grouped`): group e of len_e = ends[e] - ends[e - 1] rows has
ceil(len_e / 128) blocks, the last of which may be partial, and its scales follow those of group
e - 1. Only the device knows their total number, so the maximum is allocated.

Every function is an operator of torch's (`phalanx::...`), opaque to a compiler.

Not implemented: e5m2, stochastic rounding, delayed scaling (a history of maxima saves one pass that
fusion saves as well, and is wrong after every jump).

Shapes: R rows, D columns, r = ceil(R / 128), d = ceil(D / 128), E experts or groups,
g = R // 128 + E.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import device
from kernels.fp8 import (
    BLOCK,
    MIN_SCALE,
    Quantized,
    empty_column_major,
    empty_columns,
    empty_rows,
    fp8_dtype,
    fp8_values,
)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantize_1x128(x_RD: Tensor, power_of_two: bool = False) -> Quantized:
    """Data `[R, D]` and scales `[R, d]` (column-major), a scale per 128 columns of a row.

    x_RD: bf16, fp16 or fp32.
    """
    _check(x_RD)
    return Quantized(*_rows(x_RD, power_of_two))


def quantize_128x1(x_RD: Tensor, power_of_two: bool = False) -> Quantized:
    """Data `[R, D]`, stored transposed, and scales `[r, D]`, a scale per 128 rows of a column."""
    _check(x_RD)
    return Quantized(*_columns(x_RD, None, None, power_of_two))


def quantize_1x128_128x1(x_RD: Tensor, power_of_two: bool = False) -> tuple[Quantized, Quantized]:
    """Both forms in one pass over x: a gradient is an operand of two products with different
    sums."""
    _check(x_RD)
    rows, row_scales, columns, column_scales = _both(x_RD, None, None, power_of_two)
    return Quantized(rows, row_scales), Quantized(columns, column_scales)


def quantize_128x1_grouped(
    x_RD: Tensor, ends_E: Tensor, counts_E: Tensor, power_of_two: bool = False
) -> Quantized:
    """`quantize_128x1` of every group separately: data `[R, D]`, stored transposed, scales `[g,
    D]`.

    ends_E: end of every group, int32 or int64, non-decreasing, at most R. counts_E: its true rows,
    which come first; the others are treated as zeros. Rows from the last end on are not read, and
    undefined in the data. Scales without a block are 2^-80.
    """
    _check(x_RD)
    return Quantized(*_columns(x_RD, ends_E, counts_E, power_of_two))


def quantize_1x128_128x1_grouped(
    x_RD: Tensor, ends_E: Tensor, counts_E: Tensor, power_of_two: bool = False
) -> tuple[Quantized, Quantized]:
    """`quantize_1x128` and `quantize_128x1_grouped` in one pass over x. Rows from the last end on
    are undefined in both, and so are their scales."""
    _check(x_RD)
    rows, row_scales, columns, column_scales = _both(x_RD, ends_E, counts_E, power_of_two)
    return Quantized(rows, row_scales), Quantized(columns, column_scales)


def quantize_128x128(w_RD: Tensor, power_of_two: bool = False) -> tuple[Quantized, Tensor]:
    """Data `[R, D]` and scales `[r, d]`, a scale per square block; and the data again in
    column-major memory, for the product that sums over rows. `[E, R, D]`: each matrix
    separately."""
    _check(w_RD, matrices=True)
    data, scales, transposed = _blocks(w_RD, power_of_two)
    return Quantized(data, scales), transposed


def quantize_1x128_reference(x_RD: Tensor, power_of_two: bool = False) -> Quantized:
    """Plain-torch form of `quantize_1x128`."""
    return _reference(x_RD, (1, BLOCK), power_of_two, fp8_dtype(x_RD.device))


def quantize_128x1_reference(x_RD: Tensor, power_of_two: bool = False) -> Quantized:
    """Plain-torch form of `quantize_128x1`."""
    return _reference(x_RD, (BLOCK, 1), power_of_two, fp8_dtype(x_RD.device))


def quantize_1x128_128x1_reference(
    x_RD: Tensor, power_of_two: bool = False
) -> tuple[Quantized, Quantized]:
    """Plain-torch form of `quantize_1x128_128x1`."""
    return (
        quantize_1x128_reference(x_RD, power_of_two),
        quantize_128x1_reference(x_RD, power_of_two),
    )


def quantize_128x1_grouped_reference(
    x_RD: Tensor, ends_E: Tensor, counts_E: Tensor, power_of_two: bool = False
) -> Quantized:
    """Plain-torch form of `quantize_128x1_grouped`, a loop over the groups."""
    (R, D), dtype = x_RD.shape, fp8_dtype(x_RD.device)
    data = empty_column_major((R, D), dtype, x_RD.device).zero_()
    scales = torch.full((R // BLOCK + len(ends_E), D), MIN_SCALE, device=x_RD.device)
    for rows, n_true, blocks in group_blocks(ends_E, counts_E):
        x = x_RD[rows].clone()
        x[n_true:] = 0
        data[rows], scales[blocks] = _reference(x, (BLOCK, 1), power_of_two, dtype)
    return Quantized(data, scales)


def quantize_1x128_128x1_grouped_reference(
    x_RD: Tensor, ends_E: Tensor, counts_E: Tensor, power_of_two: bool = False
) -> tuple[Quantized, Quantized]:
    """Plain-torch form of `quantize_1x128_128x1_grouped`."""
    x_RD = x_RD.clone()
    last = 0
    for rows, n_true, _ in group_blocks(ends_E, counts_E):
        x_RD[rows][n_true:] = 0
        last = rows.stop
    x_RD[last:] = 0
    return (
        quantize_1x128_reference(x_RD, power_of_two),
        quantize_128x1_grouped_reference(x_RD, ends_E, counts_E, power_of_two),
    )


def quantize_128x128_reference(
    w_RD: Tensor, power_of_two: bool = False
) -> tuple[Quantized, Tensor]:
    """Plain-torch form of `quantize_128x128`."""
    dtype = fp8_dtype(w_RD.device)
    if w_RD.dim() == 2:
        data, scales = _reference(w_RD, (BLOCK, BLOCK), power_of_two, dtype)
    else:
        E, R, D = w_RD.shape
        data = torch.empty(w_RD.shape, dtype=dtype, device=w_RD.device)
        scales = torch.empty(E, -(-R // BLOCK), -(-D // BLOCK), device=w_RD.device)
        for e in range(E):
            data[e], scales[e] = _reference(w_RD[e], (BLOCK, BLOCK), power_of_two, dtype)
    transposed = empty_column_major(w_RD.shape, dtype, w_RD.device)
    return Quantized(data, scales), transposed.copy_(data)


def dequantize_1x128(
    data_RD: Tensor, scales_Rd: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`[R, D]` in `dtype`: the product in fp32, then one rounding."""
    return _dequantize(data_RD, scales_Rd, (1, BLOCK), dtype)


def dequantize_128x1(
    data_RD: Tensor, scales_rD: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`[R, D]` in `dtype`: the product in fp32, then one rounding."""
    return _dequantize(data_RD, scales_rD, (BLOCK, 1), dtype)


def dequantize_128x1_grouped(
    data_RD: Tensor, scales_gD: Tensor, ends_E: Tensor, counts_E: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """`[R, D]` in `dtype`: the product in fp32, then one rounding; zero outside the true rows."""
    x_RD = torch.zeros(data_RD.shape, dtype=dtype, device=data_RD.device)
    for rows, n_true, blocks in group_blocks(ends_E, counts_E):
        x = _dequantize(data_RD[rows], scales_gD[blocks], (BLOCK, 1), dtype)
        x_RD[rows][:n_true] = x[:n_true]
    return x_RD


def dequantize_128x128(
    data_RD: Tensor, scales_rd: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`[R, D]`, or `[E, R, D]`, in `dtype`: the product in fp32, then one rounding."""
    return _dequantize(data_RD, scales_rd, (BLOCK, BLOCK), dtype)


def _check(x: Tensor, matrices: bool = False) -> None:
    if x.dim() not in ((2, 3) if matrices else (2,)) or x.dtype not in _DTYPES:
        raise ValueError(
            f"quantization takes a matrix in bf16, fp16 or fp32, got {list(x.shape)} in {x.dtype}"
        )


def group_blocks(ends_E: Tensor, counts_E: Tensor) -> Iterator[tuple[slice, int, slice]]:
    """For every group: its rows, the number of true rows, and its blocks."""
    start = block = 0
    for end, n_true in zip(ends_E.tolist(), counts_E.tolist(), strict=True):
        n_blocks = -(-(end - start) // BLOCK)
        yield slice(start, end), n_true, slice(block, block + n_blocks)
        start, block = end, block + n_blocks


def _reference(
    x_RD: Tensor, block: tuple[int, int], power_of_two: bool, dtype: torch.dtype
) -> Quantized:
    (R, D), (height, width) = x_RD.shape, block
    x = x_RD.float()
    if D % width or R % height:
        x = F.pad(x, (0, -D % width, 0, -R % height))
    is_own = x is not x_RD
    r, d = x.shape[0] // height, x.shape[1] // width
    x = x.reshape(r, height, d, width)
    amax = x.abs().amax((1, 3)) if x.numel() else x.new_zeros(r, d)
    scales = block_scales(amax, dtype, power_of_two)
    if power_of_two:  # equals multiplying by its inverse, bit by bit
        x = torch.mul(x, 1 / scales[:, None, :, None], out=x if is_own else None)
    else:
        x = torch.div(x, scales[:, None, :, None], out=x if is_own else None)
    data = x.to(dtype).view(r * height, d * width)[:R, :D]
    if height > 1 and width == 1:
        data = empty_column_major((R, D), dtype, x.device).copy_(data)
    else:
        data = data.contiguous()
    if height == 1:
        scales = empty_column_major((r, d), torch.float32, x.device).copy_(scales)
    return Quantized(data, scales)


def block_scales(maxima: Tensor, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """fp32 scales of blocks from their largest magnitudes; NaN if that is not finite.

    dtype: of the data, e4m3 or e5m2.
    """
    scales = (maxima / torch.finfo(dtype).max).clamp_(min=MIN_SCALE)
    scales[~maxima.isfinite()] = float("nan")
    return _round_up_to_power_of_two(scales) if power_of_two else scales


def _round_up_to_power_of_two(scales: Tensor) -> Tensor:
    """Round up bitwise: add the maximum mantissa, which carries unless it is zero, and clear it."""
    rounded = (scales.view(torch.int32) + 0x7FFFFF & 0x7F800000).view(torch.float32)
    return rounded.masked_fill_(scales.isnan(), float("nan"))


def _dequantize(
    data_RD: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    (*matrices, R, D), (height, width) = data_RD.shape, block
    grid = (*matrices, -(-R // height), -(-D // width))
    assert scales.shape == grid, (data_RD.shape, scales.shape)
    for dim, repeats in zip((-2, -1), block, strict=True):
        if repeats > 1:
            scales = scales.repeat_interleave(repeats, dim)
    return fp8_values(data_RD).float().mul_(scales[..., :R, :D]).to(dtype)


@torch.library.custom_op("phalanx::quantize_1x128", mutates_args=())
def _rows(x_RD: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    if not device.on_accelerator(x_RD):
        rows = quantize_1x128_reference(x_RD, power_of_two)
        return rows.data, rows.scales
    made, _ = _launch(x_RD, None, None, power_of_two, rows=True, columns=False)
    assert made is not None
    return made.data, made.scales


@_rows.register_fake
def _(x_RD: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    return empty_rows(x_RD.shape, x_RD.device)


@torch.library.custom_op("phalanx::quantize_128x1", mutates_args=())
def _columns(
    x_RD: Tensor, ends_E: Tensor | None, counts_E: Tensor | None, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    if device.on_accelerator(x_RD):
        _, columns = _launch(x_RD, ends_E, counts_E, power_of_two, rows=False, columns=True)
        assert columns is not None
    elif ends_E is None or counts_E is None:
        columns = quantize_128x1_reference(x_RD, power_of_two)
    else:
        columns = quantize_128x1_grouped_reference(x_RD, ends_E, counts_E, power_of_two)
    return columns.data, columns.scales


@_columns.register_fake
def _(
    x_RD: Tensor, ends_E: Tensor | None, counts_E: Tensor | None, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    return empty_columns(x_RD.shape, ends_E, x_RD.device)


@torch.library.custom_op("phalanx::quantize_1x128_128x1", mutates_args=())
def _both(
    x_RD: Tensor, ends_E: Tensor | None, counts_E: Tensor | None, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if device.on_accelerator(x_RD):
        rows, columns = _launch(x_RD, ends_E, counts_E, power_of_two, rows=True, columns=True)
        assert rows is not None and columns is not None
    elif ends_E is None or counts_E is None:
        rows, columns = quantize_1x128_128x1_reference(x_RD, power_of_two)
    else:
        rows, columns = quantize_1x128_128x1_grouped_reference(x_RD, ends_E, counts_E, power_of_two)
    return *rows, *columns


@_both.register_fake
def _(
    x_RD: Tensor, ends_E: Tensor | None, counts_E: Tensor | None, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *empty_rows(x_RD.shape, x_RD.device), *empty_columns(x_RD.shape, ends_E, x_RD.device)


@torch.library.custom_op("phalanx::quantize_128x128", mutates_args=())
def _blocks(w_RD: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Data, scales, and the data in column-major memory."""
    if not device.on_accelerator(w_RD):
        quantized, transposed = quantize_128x128_reference(w_RD, power_of_two)
        return *quantized, transposed
    from kernels.quantization.quantize_triton import quantize_blocks

    with device.launching_on(w_RD):
        matrices = w_RD if w_RD.dim() == 3 else w_RD[None]
        made, transposed = quantize_blocks(matrices, fp8_dtype(w_RD.device), power_of_two)
    data, scales = made
    if w_RD.dim() == 2:
        data, scales, transposed = data.squeeze(0), scales.squeeze(0), transposed.squeeze(0)
    return data, scales, transposed


@_blocks.register_fake
def _(w_RD: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor]:
    (*matrices, R, D), dtype = w_RD.shape, fp8_dtype(w_RD.device)
    scales = w_RD.new_empty(*matrices, -(-R // BLOCK), -(-D // BLOCK), dtype=torch.float32)
    transposed = empty_column_major(w_RD.shape, dtype, w_RD.device)
    return w_RD.new_empty(w_RD.shape, dtype=dtype), scales, transposed


def _launch(
    x_RD: Tensor, ends_E: Tensor | None, counts_E: Tensor | None, power_of_two: bool,
    rows: bool, columns: bool,
) -> tuple[Quantized | None, Quantized | None]:  # fmt: skip
    from kernels.quantization.quantize_triton import quantize_groups

    groups = None if ends_E is None or counts_E is None else (ends_E, counts_E)
    with device.launching_on(x_RD):
        return quantize_groups(x_RD, fp8_dtype(x_RD.device), power_of_two, rows, columns, groups)
