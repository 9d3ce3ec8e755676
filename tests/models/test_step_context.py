"""The step context: which layers use it, what is decided once, and what a repeated step keeps."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.decoder import Decoder
from models.documents import DocumentAttention
from models.init import initialize
from models.router import routers
from models.step_context import DispatchStats, MicrobatchContext, RoutingDecision
from tests.models.families import FAMILIES, GLM4
from tests.step_contexts import counts_of, layer_step, model_step, next_microbatch, totals_of

LENGTH = 12


def build() -> Decoder:
    moe = replace(GLM4.moe, seq_aux_loss_coef=0.3, global_aux_loss_coef=0.3, router_z_loss_coef=0.3)
    model = Decoder(replace(GLM4, moe=moe, init_std=0.2))
    initialize(model, model.config, seed=2)
    return model


def gradient(model: Decoder, context: MicrobatchContext | None) -> Tensor:
    """Gradients of the routers' weights, after forward and backward of the same sequence."""
    tokens_T = torch.randint(96, (LENGTH,), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(LENGTH)
    model.zero_grad()
    logits: Tensor = model(tokens_T, positions, DocumentAttention(positions[None]), context=context)
    logits.square().mean().backward()
    return torch.cat([router.weight.grad.flatten() for router in routers(model)])  # type: ignore[union-attr]


def decisions(context: MicrobatchContext) -> list[RoutingDecision]:
    found = [layer.decision for layer in context.layers if layer is not None]
    assert all(decision is not None for decision in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_knows_the_blocks_that_have_experts(family: str) -> None:
    config = FAMILIES[family]
    with torch.device("meta"):
        model = Decoder(config)
    step, recording = model_step(config, 8, 16), MicrobatchContext.recording(config)
    has_router = [bool(routers(block)) for block in model.blocks()]
    assert [totals is not None for totals in step.layers] == has_router
    assert [layer is not None for layer in step.microbatch().layers] == has_router
    assert [layer is not None for layer in recording.layers] == has_router
    assert len(step.moe_layers) == len(routers(model))


def test_a_context_that_is_used_twice_replays() -> None:
    """A second pass with the same context uses the experts of the first, whatever its scores, and
    counts nothing. Recomputation needs this; a separate microbatch needs a separate context."""
    model, other = build(), build()
    with torch.no_grad():
        for router in routers(other):
            router.weight.neg_()
    step = model_step(model.config, LENGTH, LENGTH)
    once = step.microbatch()
    first = gradient(model, once)
    made, counts = decisions(once), counts_of(step)
    again = gradient(other, once)
    assert all(a is b for a, b in zip(decisions(once), made, strict=True))
    assert torch.equal(counts_of(step), counts) and counts.sum(1).tolist() == [LENGTH * 2] * 2
    assert not torch.equal(first, again), "the weights are those of its own scores"
    own = step.microbatch()
    gradient(other, own)
    ids = zip(decisions(own), made, strict=True)
    assert not any(torch.equal(a.ids_TK, b.ids_TK) for a, b in ids)
    assert counts_of(step).sum(1).tolist() == [LENGTH * 4] * 2


def test_a_recording_replays_and_adds_nothing_up() -> None:
    """Without a step there are no auxiliary losses, so the gradient equals that without a
    context."""
    model = build()
    recording = MicrobatchContext.recording(model.config)
    plain = gradient(model, None)
    assert torch.equal(gradient(model, recording), plain)
    made = decisions(recording)
    with torch.no_grad():
        for router in routers(model):
            router.bias_E.copy_(torch.linspace(5, 0, len(router.bias_E)))  # all choose the first
    assert torch.equal(gradient(model, recording), plain), "the choice is the recorded one"
    assert all(a is b for a, b in zip(decisions(recording), made, strict=True))
    assert not torch.equal(gradient(model, None), plain)
    with_losses = gradient(build(), model_step(model.config, LENGTH, LENGTH).microbatch())
    assert not torch.equal(with_losses, plain)


def test_a_redone_step_begins_at_zero_and_keeps_what_was_sent() -> None:
    step = layer_step(4, seq_len=3, tokens=6)
    before = next_microbatch(step)
    totals = totals_of(before)
    totals.counts_E += 2
    totals.losses_3 += 1.5
    totals.dispatch.rows_sent, totals.dispatch.bytes = 7, 64
    before.decision = RoutingDecision(torch.zeros(3, 1, dtype=torch.int64), None, None)
    again = step.redo_exactly()
    assert again.exact_dispatch and not step.exact_dispatch
    assert (again.seq_len, again.tokens, again.reduce_counts) == (
        3,
        step.tokens,
        step.reduce_counts,
    )
    layer = next_microbatch(again)
    assert layer.decision is None and layer.step is again
    redone = totals_of(layer)
    assert redone.counts_E.tolist() == [0] * 4 and redone.counts_E.dtype == torch.int64
    assert redone.losses_3.tolist() == [0.0] * 3
    assert (redone.dispatch.rows_sent, redone.dispatch.bytes) == (7, 64)
    redone.dispatch.bytes += 8
    assert totals.dispatch.bytes == 72, "one account of what travels"
    redone.counts_E += 1
    assert totals.counts_E.tolist() == [2] * 4 and totals.losses_3.tolist() == [1.5] * 3


def test_numbers_of_an_exchange_go_on_on_the_device() -> None:
    like = torch.zeros(2, dtype=torch.int64)
    stats = DispatchStats(rows_sent=3, bytes=16, max_rows=5)
    for _ in range(2):  # the second time they are there already
        stats.on_device(like)
        stats.rows_sent += torch.tensor(4)
    assert isinstance(stats.rows_sent, Tensor) and int(stats.rows_sent) == 11
    assert isinstance(stats.rows_without_room, Tensor) and int(stats.rows_without_room) == 0
    assert isinstance(stats.max_rows, Tensor) and int(stats.max_rows) == 5
    assert stats.bytes == 16 and isinstance(stats.bytes, int)
