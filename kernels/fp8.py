"""Definitions that all FP8 kernels share: block size, data type of a device, memory layouts."""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
"""Side of a block."""
MIN_SCALE = 2.0**-80
"""Smallest scale. Division by it cannot overflow, and fp32 denormals do not change the FP8
result."""


class Quantized(NamedTuple):
    """FP8 data and the fp32 scales by which its blocks must be multiplied."""

    data: Tensor
    scales: Tensor


def fp8_dtype(device: torch.device) -> torch.dtype:
    """The e4m3 of a device: `fnuz` (largest value 240) on MI300, `fn` (448) everywhere else.

    Raises ValueError if the device has no FP8 tensor cores.
    """
    if device.type != "cuda":
        return torch.float8_e4m3fn
    if torch.version.hip is not None:
        arch = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        if arch.startswith("gfx94"):
            return torch.float8_e4m3fnuz
        if arch.startswith(("gfx95", "gfx12")):
            return torch.float8_e4m3fn
        raise ValueError(f"FP8 needs gfx942 or newer; {device} is {arch}: train in bf16 there")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        raise ValueError(
            f"FP8 needs compute capability 8.9 or newer; {device} has {major}.{minor}: "
            "train in bf16 there"
        )
    return torch.float8_e4m3fn


def empty_column_major(
    shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """An uninitialized `[..., R, D]`, each matrix with contiguous columns that start at multiples
    of 16 bytes."""
    *matrices, rows, columns = shape
    step = 16 // dtype.itemsize
    padded = -(-rows // step) * step
    return torch.empty(*matrices, columns, padded, dtype=dtype, device=device)[..., :rows].mT


def fp8_values(data: Tensor) -> Tensor:
    """FP8 data as bf16, which represents every value exactly; in data's memory order.

    On a CPU the conversion works on the bits: e4m3 shifted into bf16's position is its value times
    2^-120, also for denormals. torch's own cast takes three times as long there.
    """
    if data.dtype != torch.float8_e4m3fn or data.device.type != "cpu":
        return data.to(torch.bfloat16)
    codes = data.view(torch.int8).to(torch.int16)
    is_nan = codes.bitwise_and(0x7F) == 0x7F
    codes = codes.bitwise_left_shift_(4).bitwise_and_(-30736)  # 0x87F0
    values = codes.view(torch.bfloat16).mul_(2.0**120)
    return values.masked_fill_(is_nan, float("nan"))


def empty_rows(shape: tuple[int, ...] | torch.Size, here: torch.device) -> Quantized:
    """Uninitialized output of `quantize_1x128` of `[R, D]`."""
    R, D = shape
    scales = empty_column_major((R, -(-D // BLOCK)), torch.float32, here)
    return Quantized(torch.empty(R, D, dtype=fp8_dtype(here), device=here), scales)


def empty_columns(
    shape: tuple[int, ...] | torch.Size, ends_E: Tensor | None, here: torch.device
) -> Quantized:
    """Uninitialized output of `quantize_128x1` of `[R, D]`, or of its grouped form."""
    R, D = shape
    blocks = -(-R // BLOCK) if ends_E is None else R // BLOCK + ends_E.shape[0]
    scales = torch.empty(blocks, D, dtype=torch.float32, device=here)
    return Quantized(empty_column_major((R, D), fp8_dtype(here), here), scales)
