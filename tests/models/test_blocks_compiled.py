"""Compiled blocks give the same results as uncompiled ones, and compile once for all batches."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from configs.model import ModelConfig
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.init import initialize
from tests.models.families import FAMILIES
from tests.step_contexts import model_step


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(config: ModelConfig) -> Decoder:
    moe = replace(
        config.moe, seq_aux_loss_coef=0.1, global_aux_loss_coef=0.1, router_z_loss_coef=0.1
    )
    model = Decoder(replace(config, moe=moe, init_std=0.1))
    initialize(model, model.config, seed=3)
    return model


def batch(seed: int, n_sequences: int, length: int) -> tuple[Tensor, DocumentAttention]:
    """Documents of unequal length; sometimes one fills a sequence, or all of them are short."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n_sequences, length)
    positions = torch.arange(length).repeat(n_sequences, 1)
    if seed % 3:
        positions %= int(torch.randint(2, length, (), generator=generator))
    tokens_T = torch.randint(96, shape, generator=generator).flatten()
    return tokens_T, DocumentAttention(positions)


def run(model: Decoder, seed: int, n_sequences: int, length: int) -> list[Tensor]:
    """Results of a microbatch: in training with gradients, otherwise only logits."""
    tokens_T, core = batch(seed, n_sequences, length)
    positions_T = core.positions_BL.flatten()
    if not model.training:
        with torch.no_grad():
            return [model(tokens_T, positions_T, core)]
    step = model_step(model.config, length, 4 * tokens_T.numel())  # a new object every step
    loss = model(tokens_T, positions_T, core, context=step.microbatch()).square().mean()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    sums = [part for totals in step.moe_layers for part in (totals.counts_E, totals.losses_3)]
    assert all(part.any() for part in sums)
    return [loss.detach(), *gradients, *sums]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["glm4", "gpt-oss", "llama4", "deepseek-v3"])
def test_batches_that_differ_need_no_other_graph(family: str) -> None:
    """The first batches contain every kind of block and every size, in training and evaluation;
    after them nothing is compiled. (Attention on a CPU is compiled for each size.)"""
    plain, compiled = build(FAMILIES[family]), build(FAMILIES[family])
    for block in compiled.blocks():
        block.compile(backend="eager")
    sizes = [(4, 24), (3, 21), (2, 18)]
    for seed in range(24):
        with torch._dynamo.config.patch(recompile_limit=64, error_on_recompile=seed >= 12):
            if seed % 4 == 3:
                plain.eval(), compiled.eval()
            else:
                plain.train(), compiled.train()
            size = sizes[seed % 3]
            expected, got = run(plain, seed, *size), run(compiled, seed, *size)
        for right, ours in zip(expected, got, strict=True):
            assert torch.allclose(ours, right, rtol=1e-4, atol=1e-6), seed
