"""Converts weights that were published in 8 or 4 bits to fp32.

DeepSeek-V3 stores `weight` as E4M3 and `weight_scale_inv`, one fp32 factor for each block of 128 x
128 (arXiv:2412.19437, section 3.3); blocks at the edge are partial. GPT-OSS stores its experts as
MXFP4 (OCP Microscaling Formats 1.0): 32 neighbors along the input dimension share a power of two,
stored as a byte e for 2^(e - 127) (255: NaN), and a byte contains two E2M1 numbers, the first in
its low half. Its two-byte tensors have the input dimension first, the packed ones last.

Both become fp32, the dtype of master weights: a product of an E4M3 number and an fp32 factor rounds
once, MXFP4 never. Other methods (AWQ, GPTQ, bitsandbytes, ...) are an error: for such checkpoints
an unquantized one exists too.

E experts, R rows (output dimension), G groups of 32, B bytes of a group (16).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from configs.errors import UserError
from models.hf.messages import shown

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
GROUP = 32
"""Numbers that share a scale in MXFP4; a byte contains two of them."""


@dataclass(frozen=True)
class Quantization:
    """The contents of a folder's `quantization_config`."""

    method: Literal["none", "fp8", "mxfp4"] = "none"
    block: tuple[int, int] = (0, 0)
    """fp8: rows and columns that share a factor."""


def quantization_of(raw: dict[str, Any], place: str) -> Quantization:
    """The quantization of a `config.json`. Raises UserError if it is not supported."""
    given = raw.get("quantization_config")
    if given is None:
        return Quantization()
    key = f"{place}: quantization_config"
    if not isinstance(given, dict):
        raise UserError(f"{key} = {shown(given)}: must be an object")
    method = given.get("quant_method")
    if method == "mxfp4":
        return Quantization("mxfp4")
    if method != "fp8":
        raise UserError(
            f"{key}.quant_method = {shown(method)}: only fp8 (in blocks) and mxfp4 are read; "
            "take the checkpoint that is not quantized"
        )
    for name, allowed in _FP8_ALLOWED.items():
        if given.get(name) not in (None, *allowed):
            only = " or ".join(map(repr, allowed))
            raise UserError(f"{key}.{name} = {shown(given[name])}: only {only} is supported")
    block = given.get("weight_block_size")
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(type(n) is int and 1 <= n <= 2**16 for n in block)
    ):
        raise UserError(
            f"{key}.weight_block_size = {shown(block)}: must be two integers, [128, 128]"
        )
    return Quantization("fp8", (block[0], block[1]))


_FP8_ALLOWED = {
    "fmt": ("e4m3",),
    "activation_scheme": ("dynamic",),
    "scale_fmt": ("float", "ue8m0"),
    "expert_dtype": ("fp8",),
}


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the factors of an fp8 tensor of `shape`: its last two dimensions in blocks."""
    *leading, rows, columns = shape
    return (*leading, -(-rows // block[0]), -(-columns // block[1]))


def dequantize_fp8(
    weight: Tensor, scale: Tensor, block: tuple[int, int], first_row: int = 0
) -> Tensor:
    """fp32 `weight * scale`, each factor for its block.

    weight: E4M3 `[..., rows, columns]`, rows of the tensor from `first_row` on. scale: the factors
    from the block that contains `first_row` on, fp32, bf16 or E8M0.
    """
    rows, columns = weight.shape[-2:]
    block_of_row = torch.arange(first_row, first_row + rows) // block[0] - first_row // block[0]
    by_row = scale.float()[..., block_of_row, :]
    return weight.float() * by_row.repeat_interleave(block[1], dim=-1)[..., :columns]


def dequantize_mxfp4(blocks_ERGB: Tensor, scales_ERG: Tensor) -> Tensor:
    """fp32 `[E, 32 * G, R]`, the input dimension first, for the packed form with it last."""
    half = torch.tensor((*_E2M1, *(-x for x in _E2M1)))
    byte = torch.arange(256)
    pairs = torch.stack([half[byte & 15], half[byte >> 4]], dim=-1)
    values = pairs[blocks_ERGB.int()].flatten(-2)  # [E, R, G, 32]
    values *= scales_ERG.view(torch.float8_e8m0fnu).float()[..., None]
    return values.flatten(-2).transpose(1, 2)
