"""Weights in DeepSeek-V3's FP8: `weight` as E4M3 and `weight_scale_inv`, an fp32 factor for each
block of 128 x 128 (arXiv:2412.19437, section 3.3). `models.hf.quantized` reads it.

Blocks restart in every tensor of the export: gate and up have separate blocks, though ours are one
matrix. The numbers are those of `kernels.quantization.quantize`, the same as in FP8 training.

Only tensors that all readers support in FP8 are quantized. Embeddings, head, router, norms, biases
and MTP's `eh_proj` never are, as published. A projection of the layers is, unless its shape
prevents it:

- vLLM and SGLang fuse projections that read the same input (query, key and value; gate and up;
  MLA's two compressions) and concatenate their grids of factors along rows, so that only the last
  may end within a block. Fused projections share a precision, and so do all experts of a layer.
- transformers, when it dequantizes, derives the size of a block as size / number of blocks. It
  would silently read a matrix of 192 rows in blocks of 96.

Not supported: GPT-OSS and Llama 4. Their experts are published fused, the input dimension first,
and no reader has blocks for that; their FP8 and MXFP4 are other formats.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from configs.errors import UserError
from configs.model import ModelConfig
from kernels.fp8 import BLOCK
from kernels.quantization.quantize import quantize_128x128
from models.hf.table import architecture, hf_tensors, publishes_fused_experts
from models.hf.tensors import HfTensor

SCALE = "_scale_inv"
"""Suffix of the factors' name after that of their tensor."""
_JOINED = {
    ("q_proj", "k_proj", "v_proj"): ("qkv_proj",),
    ("gate_proj", "up_proj"): ("gate_up_proj",),
    ("q_a_proj", "kv_a_proj_with_mqa"): ("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"),
}
"""Projections that readers fuse, in their order, and the name of the fused one in vLLM and
SGLang."""
_ALONE = ("o_proj", "down_proj", "q_b_proj", "kv_b_proj")
_EXPERT_UPS = ("gate_proj", "up_proj", "w1", "w3")


@dataclass(frozen=True)
class Fp8Plan:
    """The tensors of an export that are quantized."""

    quantized: frozenset[str]
    """Names of the quantized tensors; each has factors of name + SCALE."""
    plain: tuple[str, ...]
    """Modules whose matrices are not quantized, by all names that readers use for them."""
    unfit: tuple[str, ...]
    """Those projections among them whose shape prevents it; fused ones under one name."""
    share: float
    """Share of all parameters that is quantized."""

    def quantization_config(self) -> dict[str, Any]:
        """The entry of config.json: the keys of DeepSeek-V3's, and the modules that transformers,
        vLLM and SGLang must not convert, in the key that all three read."""
        return {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": list(self.plain),
        }


def fp8_plan(model: ModelConfig) -> Fp8Plan:
    """The tensors to quantize in an export of `model`. Raises UserError if there are none."""
    name = architecture(model)
    if publishes_fused_experts(model):
        raise UserError(
            f"--dtype fp8: {name}: no reader has FP8 blocks for its fused experts; take bf16"
        )
    units: dict[str, list[HfTensor]] = {}
    plain: dict[str, None] = {}  # a set that keeps the order
    elements = 0
    for t in hf_tensors(model):
        elements += math.prod(t.shape)
        if len(t.shape) == 2:
            module = t.name.removesuffix(".weight")
            unit = _unit(module)
            if unit is None:
                plain[module] = None
            else:
                units.setdefault(unit, []).append(t)
    fits = {unit: _fits(unit, tensors) for unit, tensors in units.items()}
    for unit, tensors in units.items():
        if not fits[unit]:
            plain |= dict.fromkeys(_names(unit, tensors))
    chosen = [t for unit, tensors in units.items() if fits[unit] for t in tensors]
    if not chosen:
        raise UserError(
            f"--dtype fp8: {name}: no projection of this model has a shape that readers hold in "
            f"blocks of {BLOCK} (model.d_model = {model.d_model}, model.moe.d_expert = "
            f"{model.moe.d_expert}): take multiples of {BLOCK}, or export bf16"
        )
    return Fp8Plan(
        quantized=frozenset(t.name for t in chosen),
        plain=(*plain, *(() if "lm_head" in plain else ("lm_head",))),
        unfit=tuple(unit for unit, fit in fits.items() if not fit),
        share=sum(math.prod(t.shape) for t in chosen) / elements,
    )


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 data and fp32 factors of a matrix, or of rows of it that start at a block."""
    (data, scales), _ = quantize_128x128(rows)
    return data, scales


def grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """The number of blocks of a matrix along rows and columns."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def _unit(module: str) -> str | None:
    """The modules that share a precision, by one name; None if they are never quantized."""
    parent, _, last = module.rpartition(".")
    if ".experts." in module:
        return module.partition(".experts.")[0] + ".experts"
    for parts, (whole, *_) in _JOINED.items():
        if last in parts:
            return f"{parent}.{whole}"
    return module if last in _ALONE else None


def _names(unit: str, tensors: Iterable[HfTensor]) -> list[str]:
    """All names that readers use for the modules of a unit."""
    if unit.endswith(".experts"):
        return [unit]
    parent, _, last = unit.rpartition(".")
    wholes = next((names for names in _JOINED.values() if names[0] == last), ())
    return [t.name.removesuffix(".weight") for t in tensors] + [f"{parent}.{n}" for n in wholes]


def _fits(unit: str, tensors: list[HfTensor]) -> bool:
    """Whether all readers support the tensors of a unit in blocks."""
    last = {t.name: t.name.removesuffix(".weight").rpartition(".")[2] for t in tensors}
    if unit.endswith(".experts"):
        whole = [t for t in tensors if last[t.name] in _EXPERT_UPS]
    else:
        order = [part for parts in _JOINED for part in parts]
        joined = [t for t in tensors if last[t.name] in order]
        whole = sorted(joined, key=lambda t: order.index(last[t.name]))[:-1]
    return not any(t.shape[0] % BLOCK for t in whole) and not any(_misread(t) for t in tensors)


def _misread(t: HfTensor) -> bool:
    """Whether transformers would use other blocks without an error."""
    divides = all(n % count == 0 for n, count in zip(t.shape, grid(t.shape), strict=True))
    return divides and any(n > BLOCK and n % BLOCK for n in t.shape)
