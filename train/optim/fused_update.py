"""Torch's fused AdamW on this rank's parts of sharded parameters, and its state."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from parallel.shards import local_of, zeros_like

MOMENTS = ("exp_avg", "exp_avg_sq")


def initial_state(parameter: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state of AdamW's fused update before the first step. dtype: of the moments."""
    moments = {name: zeros_like(parameter, dtype) for name in MOMENTS}
    return {"step": torch.zeros((), device=parameter.device)} | moments


def fused_update(
    parameters: Sequence[Tensor], moments: Sequence[Sequence[Tensor]], steps: list[Tensor],
    group: Mapping[str, Any],
) -> None:  # fmt: skip
    """Torch's fused AdamW on this rank's parts of parameters with a gradient.

    An update of an element depends on no other. For DTensors torch would first search for their
    placement, which delays the first step, and accept one mesh per call.

    Args:
        parameters: Masters in fp32.
        moments: Per parameter its two moments in fp32, local parts.
        steps: Per parameter its number of updates.
        group: Of the optimizer.
    """
    gradients = [local_of(p.grad) for p in parameters if p.grad is not None]
    beta1, beta2 = group["betas"]
    adamw(
        [local_of(p) for p in parameters], gradients, [mean for mean, _ in moments],
        [square for _, square in moments], [], steps, fused=True, amsgrad=False, beta1=beta1,
        beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        maximize=False,
    )  # fmt: skip
