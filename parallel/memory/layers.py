"""The fewest layers whose trace determines that of all: layers with equal neighbors are alike.

FSDP2 gathers early and frees late, so the allocations of a layer also depend on its neighbors. If
two layers have equal neighbors, the layers between them may be left out of the traced model, as
long as their own combinations of neighbors occur elsewhere.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from configs.model import ModelConfig
from configs.precision import FP8Config
from configs.schema import JobConfig
from models.block import Block
from models.fp8 import check_patterns, eligible_names, stays_in_bf16
from models.mtp import MtpModule


@dataclass(frozen=True)
class Layers:
    """The blocks of a model that are traced, those of MTP modules last, and the blocks they
    represent."""

    kept: list[int]
    place: list[int]
    """For every block, the index in `kept` of the block with the same trace."""
    n_trunk: int
    """Blocks of the model without those of MTP modules."""

    @property
    def times(self) -> Counter[int]:
        """The number of blocks that each of `kept` represents."""
        return Counter(self.place)

    @property
    def trunk(self) -> list[int]:
        """Those of `kept` that are layers of the model itself."""
        return [index for index in self.kept if index < self.n_trunk]


def fewest(kinds: Sequence[Hashable], radius: int, n_trunk: int) -> Layers:
    """radius: number of neighbors on either side that affect a layer."""
    padded = [*[None] * radius, *kinds, *[None] * radius]
    around = [tuple(padded[i : i + 2 * radius + 1]) for i in range(len(kinds))]
    to_come = Counter(around)
    kept: list[int] = []
    last: dict[Hashable, int] = {}
    for index, surroundings in enumerate(around):
        to_come[surroundings] -= 1
        found = last.get(surroundings)
        if found is not None:
            between = [around[k] for k in kept[found + 1 :]]
            if all(to_come[other] for other in between):
                for other in between:
                    del last[other]
                del kept[found + 1 :]
                continue
        last[surroundings] = len(kept)
        kept.append(index)
    return Layers(kept, [last[surroundings] for surroundings in around], n_trunk)


def reduced(config: JobConfig) -> tuple[JobConfig, Layers]:
    """An experiment with the fewest layers that determine all, and these layers. The model's number
    of layers is unchanged, because it determines the type of each layer. Raises ConfigError as
    `models.fp8.apply_fp8` does."""
    model, parallel, fp8 = config.model, config.parallel, config.precision.fp8
    made = [_made(model, index) for index in range(model.n_layers + model.mtp_depth)]
    in_bf16: list[tuple[str, ...]] = [()] * len(made)
    if config.precision.recipe == "fp8_blockwise":
        in_bf16 = _in_bf16(fp8, model, made)
    every = parallel.recompute_every if parallel.recompute != "none" else 1
    kinds = [(made[i], i % every, in_bf16[i]) for i in range(len(made))]
    layers = fewest(kinds, max(parallel.prefetch, 1), model.n_layers)
    n_trunk = len(layers.trunk)
    keep = tuple(
        f"{_prefix(place, n_trunk)}.{name}"
        for place, index in enumerate(layers.kept)
        for name in in_bf16[index]
    )
    fp8 = replace(fp8, first_bf16=0, last_bf16=0, keep=keep)
    return replace(
        config,
        model=replace(model, mtp_depth=len(layers.kept) - n_trunk),
        precision=replace(config.precision, fp8=fp8),
    ), layers


class _Made(NamedTuple):
    """Settings that determine the modules of a block."""

    is_mtp: bool
    is_moe: bool
    is_full: bool
    has_rope: bool


def _made(model: ModelConfig, index: int) -> _Made:
    at, attention = min(index, model.n_layers - 1), model.attention
    return _Made(
        index >= model.n_layers, model.is_moe(at), attention.is_full(at), attention.has_rope(at)
    )


def _in_bf16(fp8: FP8Config, model: ModelConfig, made: Sequence[_Made]) -> list[tuple[str, ...]]:
    """For every block, the modules that `fp8` leaves in bf16."""
    blocks = {}
    for index, one in enumerate(made):
        if one not in blocks:
            with torch.device("meta"):
                blocks[one] = MtpModule(model) if one.is_mtp else Block(model, index)
    inside = {one: [name for name, _ in block.named_modules()] for one, block in blocks.items()}
    eligible = {one: eligible_names(block) for one, block in blocks.items()}
    prefixes = [_prefix(index, model.n_layers) for index in range(len(made))]
    if fp8.keep:
        names = ["embed", "layers", "norm", "mtp", "head"]
        for prefix, one in zip(prefixes, made, strict=True):
            names += [f"{prefix}.{name}".removesuffix(".") for name in inside[one]]
        check_patterns(fp8, names, [f"{prefixes[0]}.{name}" for name in eligible[made[0]]])
    return [
        tuple(
            name
            for name in eligible[one]
            if stays_in_bf16(fp8, index, len(made), f"{prefixes[index]}.{name}")
        )
        for index, one in enumerate(made)
    ]


def _prefix(index: int, n_layers: int) -> str:
    return f"layers.{index}" if index < n_layers else f"mtp.{index - n_layers}"
