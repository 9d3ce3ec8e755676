"""The one function that applies parallelism to a model: expert parallelism, then FSDP2.

Gradients are sums, never means: every rank divides its loss by the target tokens of the whole
step, so a sum over ranks is the gradient of the global mean, for dense parameters and experts
alike. FSDP2's own division is therefore switched off: its factor is 1 and the reduction a plain sum
(gloo has no other). Groups of one rank divide by nothing as they are; there an explicit factor only
costs a pass over the gradient.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from configs.model import Model
from configs.rules import ConfigError
from configs.schema import RunConfig
from models.decoder import Decoder
from models.init import initial_value
from models.moe import Experts, MoE
from parallel.expert import apply_expert_parallel
from parallel.mesh import Mesh
from parallel.shards import box_of, local_of

PlacementFn = Callable[[nn.Parameter], Shard]


def parallelize(model: Decoder, mesh: Mesh, config: RunConfig, compute: torch.dtype) -> None:
    """Turn a model on the meta device into this rank's part of it, still on the meta device.

    compute: dtype of forward and backward; parameters, gradients and their reduction are fp32.
    """
    apply_expert_parallel(model, mesh)
    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    reshard = config.parallel.reshard_after_forward
    for block in model.layers:
        if mesh.degrees.ep > 1 and isinstance(block.ffn, MoE):
            fully_shard(
                block.ffn.experts,
                mesh=mesh.fsdp_expert(),
                mp_policy=policy,
                reshard_after_forward=reshard,
                shard_placement_fn=_expert_placement(mesh.degrees.efsdp),
            )
        fully_shard(
            block,
            mesh=mesh.fsdp_dense(),
            mp_policy=policy,
            reshard_after_forward=reshard,
            shard_placement_fn=_block_placement(block, mesh.degrees.dp_shard),
        )
    fully_shard(model, mesh=mesh.fsdp_dense(), mp_policy=policy, reshard_after_forward=False)
    experts_alone = mesh.degrees.ep > 1 and mesh.degrees.efsdp * mesh.degrees.dp_replicate == 1
    for module in model.modules():
        alone = mesh.degrees.world == 1 or (isinstance(module, Experts) and experts_alone)
        if isinstance(module, FSDPModule) and not alone:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def materialise(model: Decoder, config: Model, seed: int, device: torch.device) -> None:
    """Allocate this rank's shards and draw their initial values; identical for every mesh."""
    try:
        model.to_empty(device=device)
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if "memory" not in str(error).lower():
            raise
        held = sum(local_of(parameter).nbytes for parameter in model.parameters())
        raise ConfigError(
            f"model: this rank's part of the weights, {held / 2**30:,.1f} GiB, does not fit into "
            f"the memory of {device}; use more ranks or a smaller model"
        ) from None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            box = box_of(parameter)
            rows, *rest = box.slices()
            value = initial_value(config, seed, name, tuple(parameter.shape), rows)
            parameter.to_local().copy_(value[(slice(None), *rest)])
        for buffer in model.buffers():
            buffer.zero_()


def _expert_dim(parameter: nn.Parameter, n_ranks: int) -> Shard:
    """Experts are divided among the ranks; where that leaves ranks idle, the model width is.

    FSDP2 shards other dimensions than the first only evenly.
    """
    n_local = (
        parameter.shape[0] if not isinstance(parameter, DTensor) else len(parameter.to_local())
    )
    # D of w13 [E, 2, F, D], w2 [E, D, F] and b2 [E, D]; what is left of b13 [E, 2, F] is small
    width = 3 if parameter.ndim == 4 else 1
    if n_local % n_ranks and parameter.shape[width] % n_ranks == 0:
        return Shard(width)
    return Shard(0)


def _expert_placement(n_ranks: int) -> PlacementFn:
    return lambda parameter: _expert_dim(parameter, n_ranks)


def _block_placement(block: nn.Module, n_ranks: int) -> PlacementFn:
    experts = {
        id(parameter)
        for module in block.modules()
        if isinstance(module, Experts)
        for parameter in module.parameters()
    }
    return lambda p: _expert_dim(p, n_ranks) if id(p) in experts else Shard(0)
