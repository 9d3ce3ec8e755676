"""Checks that all values of a state are in range before it is written."""

from collections.abc import Mapping

import torch
from torch import Tensor

from parallel.grad_norm import LARGEST
from parallel.ranks import gather_json
from parallel.shards import local_of


def values_out_of_range(weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> str:
    """A description of tensors that are out of range, with their ranks; empty if there are none.

    weights: limited as a step requires (`parallel.grad_norm.LARGEST`). others: must be finite;
    moments of squares may be larger. All ranks call it together and get the same result.
    """
    largest = float(torch.finfo(torch.float32).max)
    bad = [
        name
        for tensors, limit in ((weights, LARGEST), (others, largest))
        for name, tensor in tensors.items()
        if not _is_within(local_of(tensor).detach(), limit)
    ]
    found = [(names[0], rank) for rank, names in enumerate(gather_json(bad[:1])) if names]
    if not found:
        return ""
    ranks = ", ".join(str(rank) for _, rank in found[:20])
    return f"{found[0][0]} is out of range on rank {ranks}"


def _is_within(local: Tensor, limit: float) -> bool:
    """Compare the smallest and the largest value, which are NaN if any is: no temporary tensor."""
    if not local.numel() or not local.is_floating_point():
        return True
    low, high = local.aminmax()
    return bool(((low >= -limit) & (high <= limit)).item())
