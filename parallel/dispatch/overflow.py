"""Rows that found no room: asked for once per step, before anything has changed.

The dispatchers add up on the device what did not fit (`DispatchCounters.lost`). One sum over ranks
and one read per step tell whether the step counts; if not, it is redone on the exact path, or the
run stops.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from parallel.dispatch.gathering import routed_dispatchers
from parallel.dispatch.plan import RoutedDispatcher
from parallel.dispatch.sync_free import SyncFree
from parallel.ranks import sum_over_ranks


class CapacityOverflow(RuntimeError):
    """Rows found no room and the run was told to stop; the message names the layers."""


def overflowed(model: nn.Module, step: int) -> bool:
    """Whether rows of the step found no room on any rank, so that it has to be redone exactly.

    All ranks call it together, and get the same answer. Raises CapacityOverflow where
    `on_overflow` is "stop".
    """
    found = _limited(model)
    lost_L = [dispatcher.planner.traffic.lost for _, dispatcher in found]
    on_device = [lost for lost in lost_L if isinstance(lost, torch.Tensor)]
    assert len(on_device) == len(found), "a layer without a forward pass"
    if not found:
        return False
    lost = sum_over_ranks(torch.stack(on_device)).tolist()
    if any(lost) and found[0][1].options.on_overflow == "stop":
        layers = [f"{name} ({n} rows)" for (name, _), n in zip(found, lost, strict=True) if n]
        raise CapacityOverflow(
            f"step {step}: no room for all rows in {', '.join(layers)}; stopped before the "
            "optimizer step; raise parallel.dispatch.capacity_factor = "
            f'{found[0][1].options.capacity_factor} or set parallel.dispatch.on_overflow = "redo"'
        )
    return any(lost)


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Within it every dispatcher takes the exact path."""
    planners = [dispatcher.planner for _, dispatcher in _limited(model)]

    def switch(to: bool) -> None:
        for planner in planners:
            assert isinstance(planner, SyncFree)
            planner.exact = to

    switch(True)
    try:
        yield
    finally:
        switch(False)


def _limited(model: nn.Module) -> list[tuple[str, RoutedDispatcher]]:
    """The MoE layers whose dispatcher has room for so many rows only, by name."""
    found = routed_dispatchers(model)
    return [(name, one) for name, one in found if isinstance(one.planner, SyncFree)]
