"""A step that is stopped between microbatches leaves nothing to the next one."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from configs.loader import load
from configs.schema import JobConfig
from parallel.ranks import Ranks
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


def step(training: Training, data: list[Batch], stop_at: int = 0) -> float:
    """The loss of a step; 0 if it was stopped before that microbatch."""
    calls = iter(range(1, 100))
    done = train_step(
        training.model, training.optimizer, data, step=1, rank=0, clip_norm=1.0, mtp_weight=0.3,
        stop=lambda: next(calls) == stop_at, updated=training.fp8_weights.refresh,
        accumulation=training.accumulation,
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
    """In fp32 and one process the order of the sums is the same, so every stage has the same
    bits."""
    losses = []
    for stage in (3, 2, 1):
        config = load(TINY, [f"--parallel.zero_stage={stage}", "--parallel.ep=1"])
        training, data = build(config), batches(config)
        losses.append([step(training, data) for _ in range(3)])
    assert losses[0] == losses[1] == losses[2]
    assert losses[0][0] > losses[0][2]
