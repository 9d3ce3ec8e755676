"""Weights that are FP8 blocks in a Hugging Face folder, kept in FP8."""

from functools import partial

import torch
from torch import Tensor, nn

from kernels.fp8 import BLOCK
from kernels.gemm.linear_fp8 import Fp8Weight
from models.decoder import Decoder
from models.fp8 import fp8_weights, in_fp8
from models.hf.checkpoint import HFCheckpoint
from models.hf.fp8_blocks import grid
from models.hf.sharding import Sharding
from models.layers.box import Box
from models.parameters import spec_of

_MANTISSA = 0x7FFFFF


def use_fp8(decoder: Decoder, source: HFCheckpoint) -> None:
    """Replace the modules of a decoder on the meta device whose weights are FP8 in `source`.

    If all matrices of a module are E4M3 with factors per 128x128, it computes the same as in FP8
    training. Our gate and up are one matrix, so separate factors are possible only if a block ends
    at the end of the gate.
    """
    for prefix, module in list(decoder.named_modules()):
        names = {key: f"{prefix}.{key}" for key, _ in module.named_parameters(recurse=False)}
        weights = {key: name for key, name in names.items() if spec_of(name).fp8}
        if not weights or not all(
            _fits(source, name, module.get_parameter(key)) for key, name in weights.items()
        ):
            continue
        powers = all(_are_powers_of_two(source, name) for name in weights.values())
        replacement = in_fp8(module, powers)
        if replacement is not None:
            decoder.set_submodule(prefix, replacement)


def load_fp8(
    decoder: Decoder, source: HFCheckpoint, sharding: Sharding, device: torch.device | str
) -> dict[str, Box]:
    """Load the weights of the modules that `use_fp8` has replaced, as they are stored; returns the
    boxes that were read, by name.

    Weights are dequantized only within a product. The parameters keep their names and lose their
    last dimension, since their values are never read.
    """
    read, parameters = {}, dict(decoder.named_parameters())  # whole, where a module has local views
    for name, (module, key) in fp8_weights(decoder).items():
        local, read[name] = sharding.part(parameters[name])
        module.read_from(key, partial(_same, _read(source, name, read[name], device)))
        empty = torch.empty((*local.shape[:-1], 0), dtype=local.dtype, device="meta")
        module.register_parameter(key, nn.Parameter(empty, requires_grad=False))
    return read


def _same(weight: Fp8Weight) -> Fp8Weight:
    return weight


def _fits(source: HFCheckpoint, ours: str, weight: Tensor) -> bool:
    halves = weight.dim() > 2 and ours.endswith("w13")
    return source.is_fp8(ours, BLOCK) and not (halves and weight.shape[-2] % BLOCK)


def _are_powers_of_two(source: HFCheckpoint, ours: str) -> bool:
    return not any((f.view(torch.int32) & _MANTISSA).any() for f in source.factors(ours))


def _read(source: HFCheckpoint, ours: str, box: Box, device: torch.device | str) -> Fp8Weight:
    """Data `[..., N, D]`, gate and up one matrix, and its factors."""
    data = torch.empty(box.shape, dtype=torch.float8_e4m3fn)
    rows, columns = grid((box.shape[-2], box.shape[-1]))
    scales = torch.empty(*box.shape[:-2], rows, columns)
    source.fill_fp8(ours, data, scales, box)
    if ours.endswith("w13"):
        data, scales = data.flatten(-3, -2), scales.flatten(-3, -2)
    data = data.to(device)
    return Fp8Weight(data, data, scales.to(device))
