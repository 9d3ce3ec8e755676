"""Step contexts for tests that call a layer or a model without `train.step`."""

from collections.abc import Callable

import torch
from torch import Tensor

from configs.model import ModelConfig
from models.step_context import LayerContext, LayerTotals, StepContext


def unchanged(tensor: Tensor) -> Tensor:
    """The sum over the data ranks if there is a group."""
    return tensor


def layer_step(
    n_experts: int,
    seq_len: int = 1,
    tokens: int = 1,
    reduce: Callable[[Tensor], Tensor] = unchanged,
    device: str = "cpu",
) -> StepContext:
    """A step of a model with one MoE layer; the arguments are as in `StepContext`."""
    totals = LayerTotals.zeros(n_experts, torch.device(device))
    return StepContext(seq_len, torch.tensor(tokens, device=device), reduce, (totals,))


def next_microbatch(step: StepContext) -> LayerContext:
    """The context of the only MoE layer for the next microbatch of a `layer_step`."""
    (layer,) = step.microbatch().layers
    assert layer is not None
    return layer


def layer_context(n_experts: int, device: str = "cpu") -> LayerContext:
    """The only microbatch of a step of one MoE layer, for tests without auxiliary losses."""
    return next_microbatch(layer_step(n_experts, device=device))


def totals_of(layer: LayerContext) -> LayerTotals:
    """The sums of a step for one layer."""
    assert layer.totals is not None
    return layer.totals


def model_step(model: ModelConfig, seq_len: int, tokens: int) -> StepContext:
    """A step of a whole model in one process."""
    moe_blocks = [model.is_moe(index) for index in range(model.n_layers)]
    moe_blocks += moe_blocks[-1:] * model.mtp_depth
    return StepContext.begin(
        moe_blocks, model.moe.n_experts, seq_len, torch.tensor(tokens), unchanged
    )


def counts_of(step: StepContext) -> Tensor:
    """Choices per MoE layer and expert so far, `[L, E]`."""
    return torch.stack([totals.counts_E for totals in step.moe_layers])
