"""Recomputation replays the choice of experts, counts tokens once, and keeps the selected
results."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from configs.model import ModelConfig
from configs.schema import ParallelConfig
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.init import initialize
from models.moe import LocalDispatcher
from models.step_context import MicrobatchContext, StepContext
from parallel.recompute import apply_recompute
from tests.models.families import FAMILIES, GLM4
from tests.step_contexts import counts_of, model_step

BATCH, LENGTH = 2, 21


def build(config: ModelConfig, parallel: ParallelConfig) -> Decoder:
    moe = replace(
        config.moe, seq_aux_loss_coef=0.1, global_aux_loss_coef=0.1, router_z_loss_coef=0.1
    )
    model = Decoder(replace(config, moe=moe))
    initialize(model, model.config, seed=3)
    apply_recompute(model, parallel)
    return model


def step_of(model: Decoder) -> StepContext:
    return model_step(model.config, LENGTH, BATCH * LENGTH)


def loss(model: Decoder, context: MicrobatchContext | None) -> Tensor:
    """The routers of all modules, including MTP modules."""
    generator = torch.Generator().manual_seed(1)
    tokens_T = torch.randint(model.config.vocab_size, (BATCH * LENGTH,), generator=generator)
    positions_BL = torch.arange(LENGTH).repeat(BATCH, 1)
    core = DocumentAttention(positions_BL)
    ahead = [(tokens_T, F.linear)] * model.config.mtp_depth
    found = model(tokens_T, positions_BL.flatten(), core, F.linear, ahead, context)
    logits = torch.stack(found) if ahead else found
    return logits.square().mean()


def results(model: Decoder) -> dict[str, Tensor]:
    """Gradients of a step, and its sums."""
    step = step_of(model)
    loss(model, step.microbatch()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for i, totals in enumerate(step.moe_layers):
        found |= {f"counts of {i}": totals.counts_E, f"losses of {i}": totals.losses_3}
    return found


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Records the expert ids given to every pass through a dispatcher."""
    seen: list[Tensor] = []
    original = LocalDispatcher.run

    def run(self: LocalDispatcher, x: Tensor, ids: Tensor, *more: Any) -> Tensor:
        seen.append(ids)
        return original(self, x, ids, *more)

    monkeypatch.setattr(LocalDispatcher, "run", run)
    yield seen


@cache
def without_recomputation(family: str) -> dict[str, Tensor]:
    return results(build(FAMILIES[family], ParallelConfig()))


POLICIES = [
    ParallelConfig(recompute="full"),
    ParallelConfig(recompute="selective"),
    ParallelConfig(recompute="selective", recompute_keep=("attention",)),
    ParallelConfig(recompute="full", recompute_every=2),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.recompute}-{p.recompute_every}")
@pytest.mark.parametrize("family", FAMILIES)
def test_results_are_those_without_recomputation(family: str, policy: ParallelConfig) -> None:
    expected = without_recomputation(family)
    got = results(build(FAMILIES[family], policy))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


class Disturbance(nn.Module):
    """A norm whose result differs every time, as with another kernel or order of summation."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.calls = norm, 0

    def forward(self, x_TD: Tensor) -> Tensor:
        self.calls += 1
        generator = torch.Generator().manual_seed(self.calls)
        y_TD: Tensor = self.norm(x_TD)
        return y_TD + 0.5 * torch.randn(y_TD.shape, generator=generator)


def disturbed() -> Decoder:
    model = build(GLM4, ParallelConfig(recompute="full"))
    for block in model.layers[GLM4.n_dense_layers :]:
        block.ffn_norm = Disturbance(block.get_submodule("ffn_norm"))
    return model


def test_a_recomputation_that_rounds_differently_routes_alike(choices: list[Tensor]) -> None:
    model = disturbed()
    step = step_of(model)
    microbatch = step.microbatch()
    loss(model, microbatch).backward()
    first, again = choices[:2], choices[:1:-1]  # backward runs from the last layer to the first
    assert len(choices) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    decided = [layer.decision for layer in microbatch.layers if layer is not None]
    assert all(d is not None and d.ids_TK is ids for d, ids in zip(decided, first, strict=True))
    n_choices = BATCH * LENGTH * GLM4.moe.top_k
    assert counts_of(step).sum(1).tolist() == [n_choices, n_choices]


def test_without_a_context_it_would_not(choices: list[Tensor]) -> None:
    loss(disturbed(), None).backward()
    assert not torch.equal(choices[1], choices[2])


def test_the_next_microbatch_decides_for_itself(choices: list[Tensor]) -> None:
    """Only recomputation replays: another forward pass has a separate context."""
    model = disturbed()
    step = step_of(model)
    for _ in range(2):
        loss(model, step.microbatch()).backward()
    assert len(choices) == 8
    assert all(torch.equal(choices[i], choices[j]) for i, j in ((0, 3), (1, 2), (4, 7), (5, 6)))
    assert not torch.equal(choices[0], choices[4])
    n_choices = 2 * BATCH * LENGTH * GLM4.moe.top_k
    assert counts_of(step).sum(1).tolist() == [n_choices, n_choices]


def test_without_gradients_nothing_is_kept_or_run_again(choices: list[Tensor]) -> None:
    model = build(GLM4, ParallelConfig(recompute="full"))
    with torch.no_grad():
        plain = loss(model, None)
        step = step_of(model)
        assert torch.equal(loss(model, step.microbatch()), plain) and not plain.requires_grad
    assert len(choices) == 4
    n_choices = BATCH * LENGTH * GLM4.moe.top_k
    assert counts_of(step).sum(1).tolist() == [n_choices, n_choices]
    assert not torch.stack([totals.losses_3 for totals in step.moe_layers]).any()


class Operations(TorchDispatchMode):
    """Counts the calls of an operation."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.operation, self.count = operation, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is self.operation
        return func(*args, **(kwargs or {}))


def test_kept_products_are_not_computed_again() -> None:
    def products(run: Callable[[], Any]) -> int:
        with Operations(torch.ops.aten.mm.default) as operations:
            run()
        return operations.count

    keeping = ParallelConfig(recompute="selective", recompute_keep=("matmul",))
    counts = {}
    for name, policy in (("none", ParallelConfig()), ("full", POLICIES[0]), ("keeping", keeping)):
        model = build(GLM4, policy)
        counts[name] = products(lambda model=model: results(model))  # type: ignore[misc]
    assert counts["keeping"] == counts["none"] < counts["full"]
