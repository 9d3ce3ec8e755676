"""Applies all parallelism to a model, in this order: FP8, expert parallelism, tensor parallelism,
recomputation, compilation, FSDP2.

Gradients are sums, never means: every rank divides its loss by the target tokens of the whole
step, so a sum over ranks is the gradient of the global mean, for dense parameters and experts
alike. FSDP2's own division is therefore disabled: its factor is 1 and the reduction a plain sum
(gloo supports no other). Groups of one rank keep the default, which divides by one; with this
setting torch 2.13 would divide twice there.

FSDP2 creates one group of collectives per block and type of weight: weights that `tp` divides are
sharded over `dp_shard`, undivided ones over `dp_shard * tp`, experts over `efsdp`.

Communication of one microbatch per rank and group of N elements (its part after tp, ep, etp):
all-gather of N in the compute dtype, twice if parameters are freed after forward; reduce-scatter of
N in fp32; with replicas, all-reduce of N / (ranks that shard) in fp32. ZeRO stages 2 and 1 do less
of it (`parallel.fsdp.accumulation`). Groups of one rank do not communicate. Weights in FP8 are
gathered at one byte per element, and once per step the ranks that shard them all-reduce 4 bytes per
16,384 of their elements (`parallel.fsdp.fp8_weights`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard

from configs.dispatch import DispatchConfig
from configs.errors import ConfigError, UserError
from configs.model import ModelConfig
from configs.schema import JobConfig
from kernels.grouped_gemm.grouped_gemm_fp8 import row_alignment
from models.block import Block
from models.decoder import Decoder
from models.fp8 import apply_fp8, check_device, fp8_modules
from models.init import initial_value
from models.layers.box import Box
from models.moe import Experts, MoE
from parallel.expert import apply_expert_parallel
from parallel.fsdp.fp8_weights import check_divided, cut_within_block
from parallel.fsdp.one_rank import OneRankReduceScatter
from parallel.gloo import AllToAllReduceScatter
from parallel.mesh import Mesh
from parallel.recompute import apply_recompute
from parallel.shards import box_of, local_of
from parallel.tensor import RankOrderComm, apply_tensor_parallel

GRAPHS = 64
"""Maximum number of graphs that torch compiles of one function."""


def parallelize(model: Decoder, mesh: Mesh, config: JobConfig, compute: torch.dtype) -> None:
    """Convert a model on the meta device to this rank's part of it, still on the meta device.

    compute: dtype of forward and backward; parameters, gradients and their reduction are fp32.
    """
    fp8 = config.precision.recipe == "fp8_blockwise"
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    align = 1
    if fp8:
        names = apply_fp8(model, config.precision.fp8)
        check_device(torch.device(mesh.dense.device_type), names[0])
        align = row_alignment(mesh.device_type)
    apply_expert_parallel(
        model, mesh, config.parallel.dispatch, align, config.precision.fp8.power_of_two
    )
    apply_tensor_parallel(model, mesh.dense["tp"])
    if fp8:
        check_divided(model, shapes)
    apply_recompute(model, config.parallel)
    if config.parallel.compile:
        # all blocks are one function for torch, which stops compiling it after 8 graphs. There are
        # more: dense and MoE blocks, with and without RoPE, gradients and fixed sizes
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
        for block in model.blocks():
            block.compile()
    _apply_fsdp(model, mesh, config, compute)


class InferenceSharding:
    """Divides a model for inference: tensor and expert parallelism as in training, without FSDP2.

    Weights are neither gathered nor updated, so every rank keeps exactly its part of them in the
    compute dtype. Weights that no axis divides (norms, router, MLA's compressions) are on every
    rank, and so are, with more ranks of `ep` than of `tp`, the divided weights of each `tp` rank.
    All ranks compute the same tokens, whose number must be a multiple of the number of ranks.
    `models.hf.sharding.Sharding` is the interface.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def apply(self, decoder: Decoder) -> None:
        """Divide a decoder on the meta device. Raises UserError, one line, if `tp` would cut the
        blocks of an FP8 weight."""
        shapes = {name: parameter.shape for name, parameter in decoder.named_parameters()}
        align = row_alignment(self.mesh.device_type) if fp8_modules(decoder) else 1
        apply_expert_parallel(decoder, self.mesh, DispatchConfig(), align, inference=True)
        apply_tensor_parallel(decoder, self.mesh.dense["tp"], RankOrderComm)
        cut = cut_within_block(decoder, shapes)
        if cut is not None:
            raise UserError(
                f"--tp {self.mesh.parallel_dims.tp}: {cut}; use a smaller --tp, a larger --ep if "
                "it is an expert's weight, or --dtype bf16"
            )

    def part(self, tensor: Tensor) -> tuple[Tensor, Box]:
        """The memory of this rank's part, and its box in the whole."""
        return local_of(tensor), box_of(tensor)


def _apply_fsdp(model: Decoder, mesh: Mesh, config: JobConfig, compute: torch.dtype) -> None:
    shard = _Fsdp(config, compute, mesh)
    dense, whole = mesh.fsdp(mesh.dense, "dp_shard"), mesh.fsdp(mesh.whole, "dp_shard_tp")
    expert = mesh.fsdp(mesh.expert, "efsdp")
    divided = mesh.parallel_dims.tp > 1
    blocks = model.blocks()
    for block in blocks:
        if isinstance(block.ffn, MoE) and (divided or mesh.parallel_dims.ep > 1 or shard.is_split):
            shard([block.ffn.experts], expert)
        if divided:
            shard(_undivided(block), whole)
        shard([block], dense)
    if divided:
        shard([model.norm], whole)
    shard([model], dense, root=True)
    ahead = config.parallel.prefetch
    for i, block in enumerate(blocks):
        if ahead:
            assert isinstance(block, FSDPModule)
            block.set_modules_to_forward_prefetch(_groups(blocks[i + 1 : i + 1 + ahead]))
            block.set_modules_to_backward_prefetch(_groups(blocks[max(i - ahead, 0) : i][::-1]))


def _undivided(block: nn.Module) -> list[nn.Module]:
    """The modules of a block whose own weights are not divided."""
    found = []
    for module in block.modules():
        own = list(module.parameters(recurse=False))
        if own and not isinstance(module, Experts) and not isinstance(own[0], DTensor):
            found.append(module)
    return found


def _groups(blocks: list[Block]) -> list[FSDPModule]:
    """The FSDP2 modules of the blocks, one per group of collectives."""
    states: set[int] = set()
    found: list[FSDPModule] = []
    for block in blocks:
        for module in block.modules():
            if isinstance(module, FSDPModule) and id(module._get_fsdp_state()) not in states:
                states.add(id(module._get_fsdp_state()))
                found.append(module)
    return found


class _Fsdp:
    """FSDP2 with the options of this run."""

    def __init__(self, config: JobConfig, compute: torch.dtype, mesh: Mesh) -> None:
        self.parallel = config.parallel
        self.is_split = self.parallel.stage(experts=True) != self.parallel.stage(experts=False)
        """Whether experts need a group of their own on any mesh."""
        self.policy = MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        self.on_gloo = mesh.device_type == "cpu"
        self.offload = OffloadPolicy()
        if config.parallel.cpu_offload:
            self.offload = CPUOffloadPolicy(pin_memory=mesh.dense.device_type == "cuda")

    def __call__(self, modules: list[nn.Module], mesh: DeviceMesh, root: bool = False) -> None:
        """Shard the parameters of `modules` that are not sharded yet, as one group."""
        n_ranks = mesh.shape[-1]
        stage = self.parallel.stage(experts=isinstance(modules[0], Experts))
        experts = {
            id(p)
            for module in modules
            for part in module.modules()
            if isinstance(part, Experts)
            for p in part.parameters()
        }
        fully_shard(
            modules if len(modules) > 1 else modules[0],
            mesh=mesh,
            mp_policy=self.policy,
            offload_policy=self.offload,
            reshard_after_forward=self.parallel.reshard_after_forward and stage == 3 and not root,
            shard_placement_fn=lambda p: placement(p, n_ranks, id(p) in experts),
        )
        if mesh.size() > 1:
            assert isinstance(modules[0], FSDPModule)
            modules[0].set_gradient_divide_factor(1.0)
            modules[0].set_force_sum_reduction_for_comms(True)
        reduce_scatter: Any = None
        if self.on_gloo and mesh.size() == 1:
            reduce_scatter = OneRankReduceScatter()
        elif self.on_gloo and n_ranks > 1:
            reduce_scatter = AllToAllReduceScatter()
        if reduce_scatter is not None:
            assert isinstance(modules[0], FSDPModule)
            modules[0].set_custom_reduce_scatter(reduce_scatter)


def placement(parameter: nn.Parameter, n_ranks: int, expert: bool) -> Shard:
    """The dimension that FSDP2 divides among `n_ranks`: the first, or, if some ranks would then
    have less than others, another that divides evenly; for experts the model width.

    FSDP2 divides dimensions other than the first only evenly.
    """
    shape = local_of(parameter).shape
    if shape[0] % n_ranks == 0:
        return Shard(0)
    # D of w13 [E, 2, F, D], w2 [E, D, F] and b2 [E, D]; b13 [E, 2, F] is small
    width = 3 if parameter.ndim == 4 else 1
    others = [width] if expert else sorted(range(1, len(shape)), key=lambda dim: -shape[dim])
    even = [dim for dim in others if shape[dim] % n_ranks == 0]
    return Shard(even[0] if even else 0)


def materialize(
    model: Decoder, config: ModelConfig, seed: int, device: torch.device, offload: bool = False
) -> None:
    """Allocate this rank's shards and draw their initial values, which are the same for every mesh.

    offload: keep the shards in host memory; FSDP2 copies them to the device.
    """
    home = torch.device("cpu") if offload else device
    try:
        model.to_empty(device=home)
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if "memory" not in str(error).lower():
            raise
        held = sum(local_of(parameter).nbytes for parameter in model.parameters())
        raise ConfigError(
            f"model: this rank's part of the weights, {held / 2**30:,.1f} GiB, does not fit into "
            f"the memory of {home}; use more ranks or a smaller model"
        ) from None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            box = box_of(parameter)
            rows, *rest = box.slices()
            value = initial_value(config, seed, name, tuple(parameter.shape), rows)
            parameter.to_local().copy_(value[(slice(None), *rest)])
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.zeros_like(buffer, device=device))
