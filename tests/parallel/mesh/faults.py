"""Typical errors of composed parallelism, inserted to show that the test detects them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn

import models.parameters
import train.step
from models.decoder import Decoder
from models.moe import MoE
from parallel.mesh import Mesh
from parallel.shards import local_of
from train.data.batches import Batch

Fault = Callable[[Decoder, Mesh], AbstractContextManager[None]]


@contextmanager
def expert_gradient_over_ep(model: Decoder, mesh: Mesh) -> Iterator[None]:
    """Divides expert gradients by ep, as an average instead of a sum would."""
    norm = train.step.global_grad_norm

    def divided(parameters: list[nn.Parameter], rank: int) -> torch.Tensor:
        last = _moe(model).experts.get_parameter("w13")
        assert last.grad is not None
        local_of(last.grad).div_(mesh.parallel_dims.ep)
        return norm(parameters, rank)

    with patch.object(train.step, "global_grad_norm", divided):
        yield


@contextmanager
def router_not_reduced_over_tp(model: Decoder, mesh: Mesh) -> Iterator[None]:
    """The router's gradient uses only the tokens of the first rank of every tp group."""
    with _first_tp_rank_alone(_moe(model).router, mesh):
        yield


@contextmanager
def norm_not_reduced_over_tp(model: Decoder, mesh: Mesh) -> Iterator[None]:
    """The gradient of a norm between divided layers uses only the first rank's tokens."""
    norm = model.layers[-1].get_submodule("attention_norm")
    with _first_tp_rank_alone(norm, mesh):
        yield


@contextmanager
def down_bias_twice(model: Decoder, mesh: Mesh) -> Iterator[None]:
    """Every etp rank adds the whole bias of the down projection."""
    experts = _moe(model).experts
    once = experts.local_views["b2"]
    experts.set_local_view("b2", lambda whole: mesh.parallel_dims.etp * once(whole))
    yield


@contextmanager
def mean_of_means(model: Decoder, mesh: Mesh) -> Iterator[None]:
    """Each microbatch has the same weight, however many targets it has."""
    loss_sums = train.step.loss_sums

    def equal(model: Decoder, batch: Batch, *options: Any) -> Any:
        return loss_sums(model, batch, *options) * (batch.targets_T.numel() / batch.n_targets)

    with patch.object(train.step, "loss_sums", equal):
        yield


@contextmanager
def repeated_shard(model: Decoder, mesh: Mesh) -> Iterator[None]:
    """Every rank starts from the first rank's experts."""
    with torch.no_grad():
        dist.broadcast(local_of(_moe(model).experts.get_parameter("w2")), 0)
    yield


@contextmanager
def experts_without_decay(model: Decoder, mesh: Mesh) -> Iterator[None]:
    """Routed experts, which have a separate mesh, get no weight decay."""
    table = models.parameters.PARAMETERS
    without = {
        key: replace(spec, decay=False) for key, spec in table.items() if key.startswith("experts.")
    }
    with patch.dict(table, without):
        yield


FAULTS: dict[str, Fault] = {
    "none": lambda model, mesh: nullcontext(),
    "expert gradient / ep": expert_gradient_over_ep,
    "router not reduced over tp": router_not_reduced_over_tp,
    "norm not reduced over tp": norm_not_reduced_over_tp,
    "down bias twice": down_bias_twice,
    "mean of means": mean_of_means,
    "repeated shard": repeated_shard,
    "experts without decay": experts_without_decay,
}


def _moe(model: Decoder) -> MoE:
    return [module for module in model.modules() if isinstance(module, MoE)][-1]


@contextmanager
def _first_tp_rank_alone(module: nn.Module, mesh: Mesh) -> Iterator[None]:
    def cut(module: nn.Module, inputs: Any) -> None:
        if mesh.dense["tp"].get_local_rank():
            module.get_parameter("weight").register_hook(torch.zeros_like)

    handle = module.register_forward_pre_hook(cut)
    yield
    handle.remove()
