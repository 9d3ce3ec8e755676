"""Compares the parameters that several ranks hold, bit for bit, and names a rank that differs.

Replicas get the same gradients and compute the same update, so they stay equal; a difference is an
error of memory or arithmetic that no other check notices.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from parallel.ranks import gather_json
from parallel.shards import box_of, local_of


def differing_replicas(tensors: Mapping[str, Tensor]) -> str:
    """A description of the first difference; empty if there is none. All ranks call it together and
    get the same result.

    tensors: of this rank, by name; parts with the same name and place in the whole must be equal.
    """
    own = {name: [str(box_of(t)), checksum(local_of(t))] for name, t in tensors.items()}
    by_rank: list[dict[str, Any]] = gather_json(own)
    for name in own:
        places: dict[str, dict[int, int]] = {}
        for rank, found in enumerate(by_rank):
            place, value = found[name]
            places.setdefault(place, {})[rank] = value
        for values in places.values():
            line = _different(name, values)
            if line:
                return line
    return ""


def checksum(local: Tensor) -> int:
    """A sum of the bits of a tensor, weighted by position modulo 2^31 - 1: any single changed value
    changes it, and so does an exchange of two."""
    flat = local.detach().contiguous().view(-1)
    if not flat.numel():
        return 0
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    words = flat.view(bits).to(torch.int64)
    places = torch.arange(1, len(words) + 1, device=words.device) % 65_521 + 1
    return int((words * places).sum())  # wraps around, in the same way everywhere


def _different(name: str, values: Mapping[int, int]) -> str:
    """The ranks whose checksum is not that of most."""
    counts = Counter(values.values())
    if len(counts) < 2:
        return ""
    (usual, most), (_, next_most) = counts.most_common(2)
    if most == next_most:
        ranks = ", ".join(map(str, values))
        return f"{name} differs between rank {ranks}, which should hold the same values"
    wrong = [rank for rank, value in values.items() if value != usual]
    right = [rank for rank, value in values.items() if value == usual]
    return (
        f"{name} on rank {', '.join(map(str, wrong))} differs from rank "
        f"{', '.join(map(str, right))}, which hold the same values"
    )
