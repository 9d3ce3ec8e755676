"""Whether a state can be trained on: a tensor with a number out of range is never written."""

from collections.abc import Mapping

import torch
from torch import Tensor

from parallel.grad_norm import LARGEST
from parallel.ranks import gather_json
from parallel.shards import local_of


def values_out_of_range(weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> str:
    """Which tensors cannot be trained on, and on which ranks, in words; empty where all can.

    weights: as a step wants them (`parallel.grad_norm.LARGEST`). others: finite is enough; moments
    of squares may be larger. All ranks call it together and get the same answer.
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
    """By the smallest and the largest value, which are NaN where one is: no second tensor."""
    if not local.numel() or not local.is_floating_point():
        return True
    low, high = local.aminmax()
    return bool(((low >= -limit) & (high <= limit)).item())
