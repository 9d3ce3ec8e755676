"""The MoE layer against plain loops; router choice, balancing bias and counts."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.loader import load
from configs.model import ModelConfig, MoEConfig
from models.init import initial_value, initialize
from models.moe import MoE
from models.router import Router, routers, update_biases
from tests.runs import TINY
from tests.step_contexts import counts_of, layer_step, next_microbatch


def tiny_model(**moe: object) -> ModelConfig:
    model = load(TINY).model
    return replace(model, moe=replace(model.moe, **moe))  # type: ignore[arg-type]


def layer(model: ModelConfig, seed: int = 0) -> MoE:
    torch.manual_seed(seed)
    moe = MoE(model)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    moe.router.bias_E.zero_()
    torch.nn.init.normal_(moe.router.bias_E, std=0.05)
    return moe


def reference(moe: MoE, x_TD: Tensor) -> Tensor:
    """The layer computed token by token, expert by expert."""
    config, router = moe.router.config, moe.router
    outputs = []
    for x in x_TD:
        logits = router.weight @ x
        scores = logits.softmax(0) if config.score_func == "softmax" else logits.sigmoid()
        chosen = (scores + router.bias_E).topk(config.top_k).indices
        weights = scores[chosen]
        if config.norm_top_k:
            weights = weights / weights.sum()
        y = torch.zeros_like(x)
        for weight, e in zip(weights, chosen, strict=True):
            w13, w2 = moe.experts.w13[e], moe.experts.w2[e]
            y = y + config.route_scale * weight * (w2 @ (F.silu(w13[0] @ x) * (w13[1] @ x)))
        if moe.shared_experts is not None:
            w13, w2 = moe.shared_experts.w13, moe.shared_experts.w2
            y = y + w2 @ (F.silu(w13[0] @ x) * (w13[1] @ x))
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score_func": "softmax", "n_shared_experts": 0},
        {"norm_top_k": False, "route_scale": 2.5},
        {"top_k": 8},
        {"top_k": 1, "n_experts": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 23])
def test_layer_equals_plain_loops(options: dict[str, object], tokens: int) -> None:
    moe = layer(tiny_model(**options))
    x = torch.randn(tokens, 32, requires_grad=True)
    inputs = [x, *moe.parameters()]
    seed = torch.randn(tokens, 32)
    ours, theirs = moe(x), reference(moe, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, seed, allow_unused=True),
        torch.autograd.grad(theirs, inputs, seed, allow_unused=True),
        strict=True,
    ):
        if b is None or b.norm() < 1e-4:  # a single expert: its normalized weight is constant
            assert a is None or a.norm() < 1e-4
        else:
            assert a is not None and (a - b).norm() / b.norm() < 1e-5


def test_a_step_counts_the_choices_of_its_microbatches() -> None:
    """Each microbatch is counted once, in training mode or not; a call without a context is not
    counted."""
    moe = layer(tiny_model())
    batches = [torch.randn(n, 32) for n in (11, 11, 5)]
    step, another = layer_step(8), layer_step(8)
    expected = torch.zeros(8, dtype=torch.int64)
    for x, training in zip(batches, (True, False, True), strict=True):
        moe.train(training)(x, next_microbatch(step))
        moe(x)
        expected += torch.bincount(moe.router(x)[0].flatten(), minlength=8)
    assert torch.equal(counts_of(step), expected[None]) and expected.sum() == 27 * 2
    assert counts_of(another).sum() == 0
    assert counts_of(step).dtype == torch.int64


def test_bias_moves_against_the_load_and_evens_it() -> None:
    model = tiny_model(bias_update_rate=0.02)
    moe = layer(model)
    moe.router.bias_E.zero_()
    with torch.no_grad():
        moe.router.weight[3] += 0.4  # make one expert preferred
    x = torch.randn(512, 32) + 0.5
    first: Tensor | None = None
    for _ in range(60):
        step = layer_step(8)
        moe(x, next_microbatch(step))
        counts = counts_of(step).double()
        first = counts if first is None else first
        update_biases(moe, counts)
    assert first is not None and first.max() / first.mean() > 2
    assert counts.max() / counts.mean() < 1.3
    assert abs(float(moe.router.bias_E.mean())) < 1e-6


def test_no_bias_stays_zero_and_forced_balance_is_even() -> None:
    moe = layer(tiny_model(bias_update_rate=0.0, force_balance=True))
    moe.router.bias_E.zero_()
    step = layer_step(8)
    moe(torch.randn(16, 32), next_microbatch(step))
    counts = counts_of(step)
    update_biases(moe, counts)
    assert counts.eq(4).all() and moe.router.bias_E.abs().max() == 0


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("norm_top_k", [True, False])
@pytest.mark.parametrize(("n_experts", "top_k"), [(4, 1), (4, 2), (1, 1)])
def test_the_loss_teaches_a_router_that_can_learn(
    n_experts: int, top_k: int, norm_top_k: bool, score_func: Literal["softmax", "sigmoid"]
) -> None:
    moe = MoEConfig(
        n_experts=n_experts, top_k=top_k, d_expert=4, norm_top_k=norm_top_k,
        score_func=score_func, route_scale=2.5,
    )  # fmt: skip
    router = Router(8, moe)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(router.weight, generator=generator)
    _, weights_TK = router(torch.randn(6, 8, generator=generator))
    (weights_TK * torch.randn(6, top_k, generator=generator)).sum().backward()
    assert router.weight.grad is not None
    moves = float(router.weight.grad.abs().max()) > 1e-5
    assert moves == moe.router_learns or n_experts == 1


def test_initial_weights_do_not_depend_on_which_part_is_drawn() -> None:
    model = tiny_model()
    name, shape = "layers.1.ffn.experts.w13", (8, 2, 16, 32)
    whole = initial_value(model, 3, name, shape)
    assert torch.equal(whole[2:5], initial_value(model, 3, name, shape, slice(2, 5)))
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, initial_value(model, 4, name, shape))
    assert abs(float(whole.std()) / 0.02 - 0.98) < 0.03  # truncated at three standard deviations


def test_initialise_gives_every_parameter_its_own_values() -> None:
    moe = layer(tiny_model())
    initialize(moe, tiny_model(), seed=0)
    values = [p for p in moe.parameters()]
    assert len({float(p.detach().sum()) for p in values}) == len(values)
    assert isinstance(routers(moe)[0], Router)
