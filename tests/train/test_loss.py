"""The z-loss in training: it changes the gradient, but no reported value."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from configs.loader import load
from kernels.layers.cross_entropy import IGNORE
from models.decoder import Decoder
from models.init import initialize
from tests.runs import TINY
from train.data.batches import sequence_batch
from train.dataset.sequences import sequences_of
from train.loss import look_ahead, loss_sums
from train.step import train_step

Z = 0.05


class Gradients:
    """An optimizer that records the gradients and changes nothing."""

    def __init__(self, model: Decoder) -> None:
        self.model, self.found = model, dict[str, Tensor]()

    def step(self) -> None:
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is not None
            self.found[name] = parameter.grad.clone()

    def zero_grad(self) -> None:
        self.model.zero_grad()


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build(depth: int) -> Decoder:
    model = Decoder(replace(load(TINY).model, mtp_depth=depth, init_std=0.2))
    initialize(model, model.config, seed=1)
    return model


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("depth", [0, 2])
def test_a_step_with_z_loss(depth: int) -> None:
    model = build(depth)
    words = np.random.default_rng(0).integers(0, model.config.vocab_size, 3 * 24 + 1)
    words[::7] = 0
    batch = sequence_batch(sequences_of(words.astype(np.uint16), 24, eot=0), np.arange(3))
    results = []
    for z in (0.0, Z):
        model = build(depth)  # a step changes the routers' biases
        gradients = Gradients(model)
        done = train_step(
            model, gradients, [batch], step=1, rank=0, clip_norm=0.0, mtp_weight=0.3, z_loss_coef=z
        )
        assert done is not None
        results.append((done.loss, done.mtp_losses, gradients.found))
    (plain, plain_mtp, without), (loss, mtp, with_z) = results
    assert loss == plain and mtp == plain_mtp

    model, z_losses = build(depth), []

    def mean_z_loss(targets_T: Tensor) -> object:
        def output(x_TD: Tensor, head_VD: Tensor) -> Tensor:
            logits = x_TD @ head_VD.T
            counted = targets_T != IGNORE
            z_losses.append(Z * logits[counted].logsumexp(1).square().mean())
            return logits.sum() * 0

        return output

    shifted = [look_ahead(batch, k) for k in range(1, depth + 1)]
    ahead = [(successors, mean_z_loss(targets)) for successors, targets in shifted]
    model(batch.tokens_T, batch.positions_T, batch.core, mean_z_loss(batch.targets_T), ahead)
    factors = [1.0, *[0.3 / max(depth, 1)] * depth]
    total = torch.stack([f * z for f, z in zip(factors, z_losses, strict=True)]).sum()
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    for name, wanted in zip(parameters, expected, strict=True):
        found = with_z[name] - without[name]
        # fp32: the difference of two gradients contains their rounding
        limit = 1e-5 * float(with_z[name].norm())
        assert wanted is None or float((found - wanted).norm()) <= limit, name
    assert sum(float(g.norm()) for g in expected if g is not None) > 1e-2
    with torch.no_grad():
        assert torch.equal(loss_sums(model, batch, depth, Z), loss_sums(model, batch, depth))
