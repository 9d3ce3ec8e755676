"""Weights in FP8 under FSDP2: quantized once per optimizer step, gathered as bytes.

FSDP2 would gather a weight in bf16, and each rank quantize the whole weight at every use. Instead,
after each optimizer step, every rank quantizes its own shard of the fp32 master weight, and FSDP2
gathers those bytes: half of bf16's, in forward and backward of all microbatches. Blocks of 128x128
may span shards. The largest value of each block is a maximum over ranks: one all-reduce per step
and group of ranks for all weights together (4 bytes per 16,384 elements), from which every rank
computes all scales. Every mesh therefore quantizes a weight to the same bits.

FSDP2 has hooks for this, which it finds as attributes of the local shard. The parameter that the
module has while it is gathered is used for its shape, dtype and gradient only: its memory is freed
at the first use (2 bytes per element).

On an accelerator the product for the input gradient reads columns. A weight that stays gathered for
a step (ZeRO stage 2 or 1) is copied to that order when it is gathered (1 byte per element), others
at each of these products.

Not supported: shards in host memory (`cpu_offload`, rejected with the config), whose bytes would
have to be moved with them.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from configs.errors import ConfigError
from configs.schema import ParallelConfig
from kernels.fp8 import BLOCK, empty_column_major, fp8_dtype
from kernels.gemm.linear_fp8 import Fp8Weight
from kernels.quantization.shard import (
    block_maxima,
    copy_column_major,
    quantize_piece,
    scales_of,
)
from models.fp8 import Fp8Experts, fp8_weights
from models.parameters import spec_of
from parallel.shards import local_of


class GatheredWeight:
    """One weight: this rank's piece in FP8, and the whole weight while FSDP2 has gathered it."""

    def __init__(self, sharded: Any, stacked: bool, power_of_two: bool, by_column: bool) -> None:
        """sharded: FSDP2's object of the parameter. stacked: its first dimension is the expert
        index. by_column: keep the gathered weight in both memory orders."""
        self.by_column = by_column
        self.power_of_two, self.group = power_of_two, sharded.mesh_info.shard_process_group
        self.local: Tensor = sharded.sharded_param._local_tensor
        self.shape = torch.Size(sharded._orig_size)
        leading = self.shape[int(stacked) : -1]
        self.experts = self.shape[:1] if stacked else torch.Size([])
        self.rows, self.columns = leading.numel(), self.shape[-1]
        n, k = -(-self.rows // BLOCK), -(-self.columns // BLOCK)
        self.grid = torch.Size([self.experts.numel() * n, k])
        dim, length = sharded.fsdp_placement.dim, sharded.padded_sharded_param_size
        begin = length[dim] * sharded.mesh_info.shard_mesh_rank
        here = slice(begin, begin + self.local.shape[dim])
        self.first_column = begin if dim == len(self.shape) - 1 else 0
        row = torch.arange(self.rows) // BLOCK
        block = torch.arange(self.experts.numel())[:, None] * n + row
        block = block.view(self.shape[:-1])
        if dim < len(self.shape) - 1:
            block = block[(slice(None),) * dim + (here,)]
        self.block_R = block.flatten().to(self.local.device)
        self.scales = torch.empty(self.grid, device=self.local.device)
        # FSDP2 gathers this: the shard, with its padding if the ranks do not divide it evenly
        self.wire = torch.zeros(length, dtype=torch.uint8, device=self.local.device)
        self.is_current = False
        """Whether the bytes are those of the master weight (`Fp8Weights.expire`)."""
        self.stand_in: Tensor | None = None
        self.whole: Fp8Weight | None = None
        self.local.fsdp_pre_all_gather = self._before
        self.local.fsdp_post_all_gather = self._after

    def raise_maxima(self, grid_nk: Tensor) -> None:
        """Raise every block's maximum to that of the local values."""
        block_maxima(self._piece(self.local), self.block_R, self.first_column, grid_nk)

    def quantize(self, maxima_nk: Tensor) -> None:
        """Quantize this rank's piece again, with scales that are the same on all ranks."""
        self.is_current = True
        self.scales.copy_(scales_of(maxima_nk, self.power_of_two))
        mine = self.wire
        for dim, size in enumerate(self.local.shape):
            mine = mine.narrow(dim, 0, size)
        piece = torch.empty_like(self._piece(self.local), dtype=torch.uint8)
        quantize_piece(self._piece(self.local), self.block_R, self.first_column, self.scales, piece)
        mine.copy_(piece.view(mine.shape))

    def __call__(self) -> Fp8Weight:
        """The gathered weight (`models.layers.linear.Source`)."""
        assert self.whole is not None, "used while it is not gathered"
        if self.stand_in is not None and self.stand_in.untyped_storage().size():
            self.stand_in.untyped_storage().resize_(0)
        return self.whole

    def _piece(self, local: Tensor) -> Tensor:
        return local.detach().reshape(-1, local.shape[-1])

    def _before(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: nn.Module, policy: Any
    ) -> tuple[tuple[Tensor, ...], None]:
        if not self.is_current:
            raise RuntimeError(
                "a weight changed after it was quantized; call Fp8Weights.refresh after every "
                "optimizer step and every load"
            )
        return (self.wire,), None

    def _after(
        self, gathered: Sequence[Tensor], metadata: None, dtype: torch.dtype,
        *, out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:  # fmt: skip
        if out is not None:  # the memory of `whole.data` has been filled again
            self._fill_columns()
            return None
        flat = gathered[0].view(-1)[: self.shape.numel()].view(fp8_dtype(gathered[0].device))
        data = flat.view(*self.experts, self.rows, self.columns)
        scales = self.scales.view(*self.experts, -1, self.grid[1])
        self.stand_in = torch.empty(self.shape, dtype=dtype, device=flat.device)
        if not self.by_column:
            self.whole = Fp8Weight(data, data, scales)
            return self.stand_in, ()
        columns = empty_column_major(data.shape, data.dtype, data.device)
        self.whole = Fp8Weight(data, columns, scales)
        self._fill_columns()
        # FSDP2 frees this memory and allocates it again, by number of elements: with the padding
        padded = columns.mT.as_strided(
            (*columns.mT.shape[:-1], columns.stride(-1)), columns.mT.stride()
        )
        return self.stand_in, (padded,)

    def _fill_columns(self) -> None:
        """Copy the gathered bytes to the second memory order."""
        if self.by_column and self.whole is not None:
            data, columns, _ = self.whole
            copy_column_major(*((data, columns) if self.experts else (data[None], columns[None])))


class Fp8Weights:
    """All weights of a model that are gathered in FP8."""

    def __init__(self, weights: list[GatheredWeight]) -> None:
        self.weights = weights

    def expire(self) -> None:
        """Mark the master weights as changed: gathering raises until they are quantized again."""
        for weight in self.weights:
            weight.is_current = False

    def refresh(self) -> None:
        """Quantize the shards again; all ranks call it whenever the weights have changed."""
        by_group: dict[Any, list[GatheredWeight]] = defaultdict(list)
        for weight in self.weights:
            by_group[weight.group].append(weight)
        with torch.no_grad():
            for group, weights in by_group.items():
                sizes = [weight.grid.numel() for weight in weights]
                maxima = torch.zeros(sum(sizes), device=weights[0].local.device)
                grids = [
                    part.view(weight.grid)
                    for weight, part in zip(weights, maxima.split(sizes), strict=True)
                ]
                for weight, grid in zip(weights, grids, strict=True):
                    weight.raise_maxima(grid)
                if group.size() > 1:
                    dist.all_reduce(maxima, dist.ReduceOp.MAX, group)
                for weight, grid in zip(weights, grids, strict=True):
                    weight.quantize(grid)


def gather_in_fp8(model: nn.Module, parallel: ParallelConfig) -> Fp8Weights:
    """Make FSDP2 gather the weights of FP8 modules in FP8; call it once the model has memory."""
    weights, in_fp8 = [], set(fp8_weights(model).values())
    for sharded in (record for group in fsdp_groups(model) for record in group.fsdp_params):
        owner, name = sharded._module_info.module, sharded._module_info.param_name
        if (owner, name) not in in_fp8:
            continue
        assert not sharded.offload_to_cpu, "refused by configs.schema"
        experts = isinstance(owner, Fp8Experts)
        by_column = parallel.stage(experts) < 3 and reads_columns(
            sharded.sharded_param._local_tensor.device
        )
        weight = GatheredWeight(sharded, experts, owner.power_of_two, by_column)
        owner.read_from(name, weight)
        weights.append(weight)
    return Fp8Weights(weights)


def reads_columns(device: torch.device) -> bool:
    """Whether the product for the input gradient reads the weight's columns, which must then be
    contiguous: everywhere but on a CPU."""
    return device.type != "cpu"


def check_divided(model: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """Raise ConfigError for FP8 weights that `tp` or `etp` cut within a block: their blocks, and
    the groups of 128 activations along them, would span two ranks and differ from those of other
    meshes.

    shapes: of the whole parameters, by name.
    """
    cut = cut_within_block(model, shapes)
    if cut is not None:
        axis = "etp" if spec_of(cut.name).ep is not None else "tp"
        raise ConfigError(
            f"precision.recipe = 'fp8_blockwise': {cut}; use a smaller parallel.{axis}, or name "
            "the module in precision.fp8.keep"
        )


@dataclass(frozen=True)
class Cut:
    """An FP8 weight that is divided within a block."""

    name: str
    part: int
    """Size of a rank's part of the divided dimension."""
    whole: int

    def __str__(self) -> str:
        return (
            f"{self.name} is divided into parts of {self.part} (of {self.whole}), which must be "
            f"multiples of {BLOCK}"
        )


def cut_within_block(model: nn.Module, shapes: Mapping[str, torch.Size]) -> Cut | None:
    """The first FP8 weight that is divided within a block; None if there is none.

    shapes: of the whole parameters, by name.
    """
    parameters = dict(model.named_parameters())
    for name in fp8_weights(model):
        local, whole = local_of(parameters[name]).shape, shapes[name]
        experts = spec_of(name).ep is not None
        for dim in range(int(experts), len(whole)):
            if local[dim] != whole[dim] and local[dim] % BLOCK:
                return Cut(name, local[dim], whole[dim])
    return None


def fsdp_groups(model: nn.Module) -> list[Any]:
    """FSDP2's groups of parameters, each once, outermost first."""
    states = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            states[id(state)] = state
    groups: list[Any] = []
    for state in states.values():
        several = getattr(state, "_fsdp_param_groups", None)  # from torch 2.12 on
        groups += [state._fsdp_param_group] if several is None else several
    return [group for group in groups if group is not None]
