"""Recomputation: the expert choice is replayed, tokens are counted once, kept results are kept."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from configs.model import ModelConfig
from configs.schema import ParallelConfig
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.init import initialize
from models.moe import LocalDispatcher
from models.router import routers
from parallel.recompute import apply_recompute
from tests.models.families import FAMILIES, GLM4

BATCH, LENGTH = 2, 21


def build(config: ModelConfig, parallel: ParallelConfig) -> Decoder:
    model = Decoder(config)
    initialize(model, config, seed=3)
    apply_recompute(model, parallel)
    return model


def loss(model: Decoder) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens_T = torch.randint(model.config.vocab_size, (BATCH * LENGTH,), generator=generator)
    positions_BL = torch.arange(LENGTH).repeat(BATCH, 1)
    core = DocumentAttention(positions_BL)
    logits: Tensor = model(tokens_T, positions_BL.flatten(), core)
    return logits.square().mean()


def gradients(model: Decoder) -> dict[str, Tensor]:
    loss(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The expert ids that every pass through a dispatcher is given."""
    seen: list[Tensor] = []
    original = LocalDispatcher.run

    def run(self: LocalDispatcher, x: Tensor, ids: Tensor, *more: Any) -> Tensor:
        seen.append(ids)
        return original(self, x, ids, *more)

    monkeypatch.setattr(LocalDispatcher, "run", run)
    yield seen


POLICIES = [
    ParallelConfig(recompute="full"),
    ParallelConfig(recompute="selective"),
    ParallelConfig(recompute="selective", recompute_keep=("attention",)),
    ParallelConfig(recompute="full", recompute_every=2),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.recompute}-{p.recompute_every}")
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_without_recomputation(family: str, policy: ParallelConfig) -> None:
    expected = gradients(build(FAMILIES[family], ParallelConfig()))
    got = gradients(build(FAMILIES[family], policy))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


class Disturbance(nn.Module):
    """A norm that answers differently every time, as another kernel or another order might."""

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
    loss(model).backward()
    first, again = choices[:2], choices[:1:-1]  # backward goes from the last layer to the first
    assert len(choices) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    n_choices = BATCH * LENGTH * GLM4.moe.top_k
    assert [int(r.tokens_per_expert_E.sum()) for r in routers(model)] == [n_choices, n_choices]


def test_without_the_tape_it_would_not(
    choices: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallel.recompute.routers", lambda block: [])
    loss(disturbed()).backward()
    assert not torch.equal(choices[1], choices[2])


def test_evaluation_keeps_nothing_and_counts_nothing(choices: list[Tensor]) -> None:
    model = build(GLM4, ParallelConfig(recompute="full")).eval()
    with torch.no_grad():
        loss(model)
    assert len(choices) == 2
    assert all(int(r.tokens_per_expert_E.sum()) == 0 and r.tape is None for r in routers(model))


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
        counts[name] = products(lambda model=model: loss(model).backward())  # type: ignore[misc]
    assert counts["keeping"] == counts["none"] < counts["full"]
