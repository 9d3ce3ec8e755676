"""Checks once per step for rows that exceeded the capacity, before any state has changed.

The dispatchers count them on the device (`DispatchStats.rows_without_room`). One sum over ranks and
one read per step determine whether the step is valid; if not, it is repeated with exact dispatch,
or the run stops.
"""

import torch
from torch import nn

from models.step_context import StepContext
from parallel.dispatch.gathering import routed_dispatchers
from parallel.dispatch.sync_free import SyncFree
from parallel.ranks import sum_over_ranks


class CapacityOverflow(RuntimeError):
    """Rows exceeded the capacity and the run is configured to stop; the message names the
    layers."""


def overflowed(model: nn.Module, context: StepContext, step: int) -> bool:
    """Whether rows of the step exceeded the capacity on any rank, so that it must be repeated
    exactly.

    All ranks call it together and get the same result. Raises CapacityOverflow if `on_overflow` is
    "stop".
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
