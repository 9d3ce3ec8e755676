"""Whether a state can be trained on: a tensor with inf or NaN is never written."""

from collections.abc import Mapping

from torch import Tensor

from parallel.ranks import gather_json
from parallel.shards import local_of


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Which tensors are not finite, and on which ranks, in words; empty where all are.

    All ranks call it together and get the same answer.
    """
    bad = [name for name, tensor in tensors.items() if not _is_finite(local_of(tensor).detach())]
    found = [(names[0], rank) for rank, names in enumerate(gather_json(bad[:1])) if names]
    if not found:
        return ""
    ranks = ", ".join(str(rank) for _, rank in found[:20])
    return f"{found[0][0]} is not finite on rank {ranks}"


def _is_finite(local: Tensor) -> bool:
    """By the smallest and the largest value, which are NaN where one is: no second tensor."""
    if not local.numel() or not local.is_floating_point():
        return True
    low, high = local.aminmax()
    return bool((low.isfinite() & high.isfinite()).item())
