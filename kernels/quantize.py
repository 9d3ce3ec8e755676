"""Quantisation to FP8 with a scale per block: `x ~ data * scale`.

Why blocks: e4m3 spans 448 down to 2^-9, five decades less than bf16. One scale per tensor lets a
single outlier push everything else to zero; one per 128 neighbours confines the damage to them
(DeepSeek-V3, arXiv:2412.19437, section 3.3). Activations and gradients get a scale per 1x128 along
the dimension that a product sums over, weights per 128x128: one scale per block of the product and
no second copy of scales for the transposed product. e4m3 serves gradients too: with a scale this
local, mantissa is worth more than e5m2's range.

The order of operations is fixed, so every device gives the same bits: in fp32, `scale = amax / 448`
and `data = x / scale`, both divisions rounded to nearest, then one rounding to FP8. `power_of_two`
rounds the scale up to a power of two, which makes the division exact (the format of Blackwell's
MX scales). Scales are at least 2^-80, so values below 2^-90 become zero. An infinity or a NaN makes
its block NaN, data and scale, since e4m3 has no infinity and a finite number there would be a lie.
Blocks at the edges may be partial; the grid of scales is rounded up.

Memory follows the readers. FP8 tensor cores of Hopper read only operands that are contiguous along
the summed dimension, so `128x1` data (summed over rows, for weight gradients) is stored transposed,
its stride padded to 16 bytes for TMA. Scales are stored column by column where a GEMM tile reads
128 rows of them: `.contiguous()` before sending rows elsewhere.

Left out: e5m2, stochastic rounding, delayed scaling (a history of maxima saves one pass that fusion
saves as well, and is wrong after every jump).

Shapes: R rows, D columns, r = ceil(R / 128), d = ceil(D / 128).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import device
from kernels.fp8 import (
    BLOCK,
    MIN_SCALE,
    Quantized,
    empty_column_major,
    fp8_dtype,
)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantize_1x128(x_RD: Tensor, power_of_two: bool = False) -> Quantized:
    """Data `[R, D]` and scales `[R, d]` (column-major), a scale per 128 columns of a row.

    x_RD: bf16, fp16 or fp32.
    """
    dtype = _check(x_RD)
    if not device.on_accelerator(x_RD):
        return _reference(x_RD, (1, BLOCK), power_of_two, dtype)
    from kernels.quantize_triton import quantize_groups

    with device.launching_on(x_RD):
        rows, _ = quantize_groups(x_RD, dtype, power_of_two, rows=True, columns=False)
    assert rows is not None
    return rows


def quantize_128x1(x_RD: Tensor, power_of_two: bool = False) -> Quantized:
    """Data `[R, D]`, stored transposed, and scales `[r, D]`, a scale per 128 rows of a column."""
    dtype = _check(x_RD)
    if not device.on_accelerator(x_RD):
        return _reference(x_RD, (BLOCK, 1), power_of_two, dtype)
    from kernels.quantize_triton import quantize_groups

    with device.launching_on(x_RD):
        _, columns = quantize_groups(x_RD, dtype, power_of_two, rows=False, columns=True)
    assert columns is not None
    return columns


def quantize_1x128_128x1(x_RD: Tensor, power_of_two: bool = False) -> tuple[Quantized, Quantized]:
    """Both forms in one pass over x: a gradient feeds two products, each summed its own way."""
    dtype = _check(x_RD)
    if not device.on_accelerator(x_RD):
        return quantize_1x128_128x1_reference(x_RD, power_of_two)
    from kernels.quantize_triton import quantize_groups

    with device.launching_on(x_RD):
        rows, columns = quantize_groups(x_RD, dtype, power_of_two, rows=True, columns=True)
    assert rows is not None and columns is not None
    return rows, columns


def quantize_128x128(w_RD: Tensor, power_of_two: bool = False) -> tuple[Quantized, Tensor]:
    """Data `[R, D]` and scales `[r, d]`, a scale per square block; and the data a second time in
    column-major memory, for the product that sums over rows."""
    dtype = _check(w_RD)
    if not device.on_accelerator(w_RD):
        return quantize_128x128_reference(w_RD, power_of_two)
    from kernels.quantize_triton import quantize_blocks

    with device.launching_on(w_RD):
        return quantize_blocks(w_RD, dtype, power_of_two)


def quantize_1x128_reference(x_RD: Tensor, power_of_two: bool = False) -> Quantized:
    """Plain-torch form of `quantize_1x128`."""
    return _reference(x_RD, (1, BLOCK), power_of_two, _check(x_RD))


def quantize_128x1_reference(x_RD: Tensor, power_of_two: bool = False) -> Quantized:
    """Plain-torch form of `quantize_128x1`."""
    return _reference(x_RD, (BLOCK, 1), power_of_two, _check(x_RD))


def quantize_1x128_128x1_reference(
    x_RD: Tensor, power_of_two: bool = False
) -> tuple[Quantized, Quantized]:
    """Plain-torch form of `quantize_1x128_128x1`."""
    return (
        quantize_1x128_reference(x_RD, power_of_two),
        quantize_128x1_reference(x_RD, power_of_two),
    )


def quantize_128x128_reference(
    w_RD: Tensor, power_of_two: bool = False
) -> tuple[Quantized, Tensor]:
    """Plain-torch form of `quantize_128x128`."""
    quantized = _reference(w_RD, (BLOCK, BLOCK), power_of_two, _check(w_RD))
    transposed = empty_column_major(w_RD.shape, quantized.data.dtype, w_RD.device)
    return quantized, transposed.copy_(quantized.data)


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


def dequantize_128x128(
    data_RD: Tensor, scales_rd: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`[R, D]` in `dtype`: the product in fp32, then one rounding."""
    return _dequantize(data_RD, scales_rd, (BLOCK, BLOCK), dtype)


def _check(x: Tensor) -> torch.dtype:
    if x.dim() != 2 or x.dtype not in _DTYPES:
        raise ValueError(
            f"quantisation takes a matrix in bf16, fp16 or fp32, got {list(x.shape)} in {x.dtype}"
        )
    return fp8_dtype(x.device)


def _reference(
    x_RD: Tensor, block: tuple[int, int], power_of_two: bool, dtype: torch.dtype
) -> Quantized:
    (R, D), (height, width) = x_RD.shape, block
    x = F.pad(x_RD.float(), (0, -D % width, 0, -R % height))
    r, d = x.shape[0] // height, x.shape[1] // width
    x = x.view(r, height, d, width)
    amax = x.abs().amax((1, 3)) if x.numel() else x.new_zeros(r, d)
    scales = (amax / torch.finfo(dtype).max).clamp_(min=MIN_SCALE)
    scales[~amax.isfinite()] = float("nan")
    if power_of_two:
        scales = _round_up_to_power_of_two(scales)
    data = (x / scales[:, None, :, None]).to(dtype).view(r * height, d * width)[:R, :D]
    if height > 1 and width == 1:
        data = empty_column_major((R, D), dtype, x.device).copy_(data)
    else:
        data = data.contiguous()
    if height == 1:
        scales = empty_column_major((r, d), torch.float32, x.device).copy_(scales)
    return Quantized(data, scales)


def _round_up_to_power_of_two(scales: Tensor) -> Tensor:
    """In the bits: add all of the mantissa, so that anything above a power carries, and cut it."""
    rounded = (scales.view(torch.int32) + 0x7FFFFF & 0x7F800000).view(torch.float32)
    return rounded.masked_fill_(scales.isnan(), float("nan"))


def _dequantize(
    data_RD: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    (R, D), (height, width) = data_RD.shape, block
    assert scales.shape == (-(-R // height), -(-D // width)), (data_RD.shape, scales.shape)
    for dim, repeats in enumerate(block):
        if repeats > 1:
            scales = scales.repeat_interleave(repeats, dim)
    return (data_RD.float() * scales[:R, :D]).to(dtype)
