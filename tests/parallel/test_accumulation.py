"""A step that is stopped between microbatches leaves nothing to the next one."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from configs.loader import load
from configs.schema import JobConfig
from parallel.fsdp.fp8_weights import fsdp_groups
from parallel.fsdp.one_rank import OneRankReduceScatter
from parallel.ranks import Ranks
from parallel.shards import local_of
from tests.runs import TINY
from train.build import Training, build_training
from train.data.batches import Batch, sequence_batch
from train.dataset.sequences import sequences_of
from train.step import train_step


@pytest.fixture(autouse=True)
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build(config: JobConfig) -> Training:
    training = build_training(config, Ranks(0, 1, torch.device("cpu"), dist.HashStore()))
    training.fp8_weights.refresh()
    return training


def batches(config: JobConfig) -> list[Batch]:
    words = np.random.default_rng(0).integers(0, config.model.vocab_size, 6 * 32 + 1)
    words[::7] = 0
    sequences = sequences_of(words.astype(np.uint16), 32, eot=0)
    return [sequence_batch(sequences, np.arange(i, i + 2)) for i in (0, 2, 4)]


def step(training: Training, data: list[Batch], stop_at: int = 0, keeps: bool = True) -> float:
    """The loss of a step; 0 if it was stopped before that microbatch. keeps: anything between
    microbatches."""
    calls = iter(range(1, 100))
    done = train_step(
        training.model, training.optimizer, data, step=1, rank=0, clip_norm=1.0, mtp_weight=0.3,
        stop=lambda: next(calls) == stop_at, updated=training.fp8_weights.refresh,
        accumulation=training.accumulation if keeps else None,
    )  # fmt: skip
    return done.loss if done else 0.0


@pytest.mark.parametrize(
    ("dense", "experts", "recipe"),
    [
        pytest.param(*stages, recipe, marks=[pytest.mark.slow] * ((i + j) % 2))
        for i, stages in enumerate([(3, 3), (2, 1), (1, 3), (1, 1)])
        for j, recipe in enumerate(["fp32", "bf16"])
    ],
)
def test_a_stopped_step_leaves_nothing(dense: int, experts: int, recipe: str) -> None:
    config = load(TINY, [f"--precision.recipe={recipe}"])
    parallel = replace(config.parallel, zero_stage=dense, expert_zero_stage=experts, ep=1)
    config = replace(config, parallel=parallel)
    data, stopped, clean = batches(config), build(config), build(config)
    for before in (1, 2, 3):  # also before FSDP2 has gathered anything
        assert step(stopped, data, stop_at=before) == 0.0
    for _ in range(2):
        assert step(stopped, data) == step(clean, data) > 0.0
    for (name, one), other in zip(
        stopped.model.named_parameters(), clean.model.parameters(), strict=True
    ):
        assert torch.equal(one.to_local(), other.to_local()), name  # type: ignore[attr-defined]
    assert not any(parameter.grad is not None for parameter in stopped.model.parameters())


def test_microbatches_add_up_in_every_stage() -> None:
    """In fp32 and one process the order of the sums is the same, so every stage has the same bits,
    those of gradients that are reduced in every microbatch."""
    losses = []
    for stage, keeps in ((3, False), (3, True), (2, True), (1, True)):
        config = load(TINY, [f"--parallel.zero_stage={stage}", "--parallel.ep=1"])
        training, data = build(config), batches(config)
        losses.append([step(training, data, keeps=keeps) for _ in range(3)])
    assert losses[0] == losses[1] == losses[2] == losses[3]
    assert losses[0][0] > losses[0][2]


class Calls(TorchDispatchMode):
    """Counts the concatenations of gradients, and the copies of a rank's part of weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parts = {local_of(parameter).data_ptr() for parameter in model.parameters()}
        self.concatenations = self.gathers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.concatenations += func is torch.ops.fsdp.chunk_cat.default
        if func is torch.ops.aten.copy_.default:
            self.gathers += args[1].data_ptr() in self.parts
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keeps_weights", [False, True])
def test_one_rank_reduces_once_per_step(keeps_weights: bool) -> None:
    config = load(TINY, [f"--parallel.reshard_after_forward={not keeps_weights}".lower()])
    training, data = build(config), batches(config)
    n_groups, counts = len(fsdp_groups(training.model)), []
    for keeps in (False, True):
        with Calls(training.model) as calls:
            step(training, data, keeps=keeps)
        counts.append((calls.concatenations, calls.gathers))
    (each, gathers_each), (once, gathers_once) = counts
    assert (each, once) == (len(data) * n_groups, n_groups)
    n_weights = len(list(training.model.parameters()))
    assert gathers_each >= len(data) * n_weights
    assert gathers_once == (n_weights if keeps_weights else gathers_each)


def test_the_output_of_a_reduction_is_its_input() -> None:
    comm, size = OneRankReduceScatter(), (7,)
    for dtype in (torch.float32, torch.bfloat16):
        made = [comm.allocate(size, dtype=dtype, device=torch.device("cpu")) for _ in range(4)]
        assert all(tensor.shape == size and tensor.dtype == dtype for tensor in made)
        assert made[0] is made[1] and made[2] is made[3] and made[0] is not made[2]
