"""Builds mesh, model and optimizer of a run on this rank, in one order.

The model is parallelized on the meta device, which raises for invalid settings before anything
takes time; then this rank's shards are allocated and initialized, and the optimizer is created.
"""

from dataclasses import dataclass

import torch

from configs.parallel_dims import resolve
from configs.schema import JobConfig
from models.decoder import Decoder
from parallel import mesh as meshes
from parallel.apply import materialize, parallelize
from parallel.fsdp.accumulation import Accumulation
from parallel.fsdp.fp8_weights import Fp8Weights, gather_in_fp8
from parallel.mesh import Mesh
from parallel.ranks import Ranks
from train.compute_dtype import compute_dtype
from train.optim.optimizer import build_optimizer


@dataclass(frozen=True)
class ShardedModel:
    """This rank's part of a model, on the meta device."""

    mesh: Mesh
    model: Decoder
    compute: torch.dtype
    """Dtype of forward and backward."""


@dataclass(frozen=True)
class Training(ShardedModel):
    """This rank's part of a model with its initial values, and the optimizer."""

    accumulation: Accumulation
    fp8_weights: Fp8Weights
    """Must be refreshed whenever the weights have changed, the first time after loading."""
    optimizer: torch.optim.AdamW


def shard_model(
    config: JobConfig, ranks: Ranks, compute: torch.dtype | None = None
) -> ShardedModel:
    """The model of an experiment, parallelized; all ranks call it together.

    compute: None for the dtype of `precision.recipe`. Raises ConfigError for invalid settings.
    """
    mesh = meshes.build(resolve(config, ranks.world), ranks.device.type)
    compute = compute or compute_dtype(config, ranks.device)
    with torch.device("meta"):
        model = Decoder(config.model)
    parallelize(model, mesh, config, compute)
    return ShardedModel(mesh, model, compute)


def build_training(
    config: JobConfig, ranks: Ranks, sharded: ShardedModel | None = None
) -> Training:
    """Model and optimizer of `config` on this rank, before a checkpoint is loaded.

    sharded: from `shard_model`, if that was called earlier.
    """
    sharded = sharded or shard_model(config, ranks)
    model = sharded.model
    materialize(model, config.model, config.run.seed, ranks.device, config.parallel.cpu_offload)
    model.train()
    optimizer = build_optimizer(model, config.optimizer, config.precision.moments)
    fp8_weights = gather_in_fp8(model, config.parallel)
    optimizer.register_step_post_hook(lambda *_: fp8_weights.expire())  # a refresh cannot be missed
    accumulation = Accumulation(model, config.parallel)
    return Training(sharded.mesh, model, sharded.compute, accumulation, fp8_weights, optimizer)
