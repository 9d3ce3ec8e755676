"""A pass that replays the expert choices of another pass."""

from dataclasses import replace

import pytest
import torch

from models.decoder import Decoder
from models.documents import DocumentAttention
from models.init import initialize
from models.router import routers
from models.step_context import MicrobatchContext
from tests.models.families import FAMILIES

CONFIG = replace(FAMILIES["glm4"], init_std=0.3)
"""A model with a dense layer and two layers with 8 experts, of which 2 are chosen."""
TOKENS = torch.arange(5, 45)
POSITIONS = torch.arange(40)


def make(seed: int) -> Decoder:
    model = Decoder(CONFIG)
    initialize(model, CONFIG, seed=seed)
    return model.eval()


def run(model: Decoder, context: MicrobatchContext | None = None) -> torch.Tensor:
    """Logits `[T, V]`."""
    logits: torch.Tensor = model(
        TOKENS, POSITIONS, DocumentAttention(POSITIONS[None]), context=context
    )
    return logits


def record(model: Decoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the experts `[L, T, K]`."""
    context = MicrobatchContext.recording(model.config)
    return run(model, context), context.routed_experts()


@torch.no_grad()
def test_recording_changes_nothing_and_its_replay_is_the_same_pass() -> None:
    model = make(0)
    plain = run(model)
    logits, ids = record(model)
    assert torch.equal(logits, plain)
    assert ids.shape == (2, 40, 2)
    assert torch.equal(run(model, MicrobatchContext.replaying(CONFIG, ids)), plain)


def test_mtp_modules_choose_for_themselves() -> None:
    """A choice covers the layers of the main stack, whatever other layers the model has."""
    ids = record(make(0))[1]
    context = MicrobatchContext.replaying(replace(CONFIG, mtp_depth=1), ids)
    made = [layer is not None and layer.decision is not None for layer in context.layers]
    assert made == [False, True, True, False]
    assert torch.equal(context.routed_experts(), ids)


def test_another_model_takes_the_choice_and_its_own_weights() -> None:
    """The experts are the given ones; routing weights, and so the router's gradient, are
    computed."""
    ids = record(make(0))[1]
    other = make(1)
    own = record(other)
    assert (own[1] != ids).any()
    seen = []
    for router in routers(other):
        router.register_forward_hook(lambda module, given, made: seen.append((given[0], made)))
    logits = run(other, MicrobatchContext.replaying(CONFIG, ids))
    assert not torch.equal(logits, own[0])
    for (x_TD, (ids_TK, weights_TK)), expected, router in zip(
        seen, ids, routers(other), strict=True
    ):
        assert torch.equal(ids_TK, expected)
        scores = (x_TD @ router.weight.T).sigmoid().gather(1, expected)
        scores = scores / scores.sum(-1, keepdim=True) * router.config.route_scale
        assert torch.allclose(weights_TK, scores, atol=1e-5)
    logits.square().mean().backward()
    for router in routers(other):
        assert router.weight.grad is not None and router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3, 40, 2), "2 MoE layers and 2 experts per token"),
        (torch.zeros(2, 40, 3), "2 MoE layers and 2 experts per token"),
        (torch.full((2, 40, 2), 8), "between 0 and 7"),
        (torch.full((2, 40, 2), -1), "between 0 and 7"),
    ],
)
def test_impossible_choices(ids: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MicrobatchContext.replaying(CONFIG, ids)
