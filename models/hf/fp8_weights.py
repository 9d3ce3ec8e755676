"""Weights that are FP8 blocks in a Hugging Face folder, kept in FP8."""

from functools import partial

import torch
from torch import Tensor, nn

from kernels.fp8 import BLOCK
from kernels.gemm.linear_fp8 import Fp8Weight
from models.decoder import Decoder
from models.fp8 import in_fp8
from models.hf.checkpoint import HFCheckpoint
from models.hf.fp8_blocks import grid
from models.parameters import spec_of

_MANTISSA = 0x7FFFFF


def keep_fp8(decoder: Decoder, source: HFCheckpoint) -> set[str]:
    """Replace the modules of a decoder on the meta device whose weights are FP8 in `source`, and
    load these unchanged; returns the names of the parameters that this loads.

    If all matrices of a module are E4M3 with factors per 128x128, it computes the same as in FP8
    training. Weights are dequantized only within a product. The parameters keep their names and
    lose their last dimension, since their values are never read. Our gate and up are one matrix, so
    separate factors are possible only if a block ends at the end of the gate.
    """
    read: set[str] = set()
    for prefix, module in list(decoder.named_modules()):
        names = {key: f"{prefix}.{key}" for key, _ in module.named_parameters(recurse=False)}
        weights = {key: name for key, name in names.items() if spec_of(name).fp8}
        if not weights or not all(
            _fits(source, name, module.get_parameter(key)) for key, name in weights.items()
        ):
            continue
        kept = {
            key: _read(source, name, module.get_parameter(key)) for key, name in weights.items()
        }
        powers = all(not (w.scales.view(torch.int32) & _MANTISSA).any() for w in kept.values())
        replacement = in_fp8(module, powers)
        if replacement is None:
            continue
        for key, weight in kept.items():
            replacement.read_from(key, partial(_same, weight))
            shape = (*module.get_parameter(key).shape[:-1], 0)
            empty = torch.empty(shape, dtype=module.get_parameter(key).dtype, device="meta")
            replacement.register_parameter(key, nn.Parameter(empty, requires_grad=False))
        decoder.set_submodule(prefix, replacement)
        read |= set(weights.values())
    return read


def _same(weight: Fp8Weight) -> Fp8Weight:
    return weight


def _fits(source: HFCheckpoint, ours: str, weight: Tensor) -> bool:
    halves = weight.dim() > 2 and ours.endswith("w13")
    return source.is_fp8(ours, BLOCK) and not (halves and weight.shape[-2] % BLOCK)


def _read(source: HFCheckpoint, ours: str, weight: Tensor) -> Fp8Weight:
    """Data `[..., N, D]`, gate and up one matrix, and its factors."""
    data = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    rows, columns = grid((weight.shape[-2], weight.shape[-1]))
    scales = torch.empty(*weight.shape[:-2], rows, columns)
    source.fill_fp8(ours, data, scales)
    if ours.endswith("w13"):
        data, scales = data.flatten(-3, -2), scales.flatten(-3, -2)
    return Fp8Weight(data, data, scales)
