"""Rows that found no room: asked for once per step, before anything has changed.

The dispatchers add up on the device how many did (`DispatchStats.rows_without_room`). One sum over
ranks and one read per step tell whether the step counts; if not, it is redone with exact dispatch,
or the run stops.
"""

import torch
from torch import nn

from models.step_context import StepContext
from parallel.dispatch.gathering import routed_dispatchers
from parallel.dispatch.sync_free import SyncFree
from parallel.ranks import sum_over_ranks


class CapacityOverflow(RuntimeError):
    """Rows found no room and the run was told to stop; the message names the layers."""


def overflowed(model: nn.Module, context: StepContext, step: int) -> bool:
    """Whether rows of the step found no room on any rank, so that it has to be redone exactly.

    All ranks call it together, and get the same answer. Raises CapacityOverflow where
    `on_overflow` is "stop".
    """
    found = routed_dispatchers(model)
    if not found or not isinstance(found[0][1].planner, SyncFree):
        return False
    without_L = [totals.dispatch.rows_without_room for totals in context.moe_layers]
    on_device = [rows for rows in without_L if isinstance(rows, torch.Tensor)]
    assert len(on_device) == len(found), "a layer without a forward pass"
    without = sum_over_ranks(torch.stack(on_device)).tolist()
    options = found[0][1].options
    if any(without) and options.on_overflow == "stop":
        layers = [f"{name} ({n} rows)" for (name, _), n in zip(found, without, strict=True) if n]
        raise CapacityOverflow(
            f"step {step}: no room for all rows in {', '.join(layers)}; stopped before the "
            "optimizer step; raise parallel.dispatch.capacity_factor = "
            f'{options.capacity_factor} or set parallel.dispatch.on_overflow = "redo"'
        )
    return any(without)
