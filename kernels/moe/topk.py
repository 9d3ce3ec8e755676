"""The k largest of each row, best first; of equal values the lowest index is first.

`torch.topk` guarantees no order among equals, and its kernels for CPU and CUDA differ. Routing
needs one: scores are equal if a sigmoid saturates or experts were copied, and a run must repeat bit
for bit. `max` is specified to return the first of equals, so k passes of it are exact. On a CPU,
however, it compares one value at a time, while `amax` and comparisons use vectors: beyond a few
dozen columns it is faster to compute the maximum, and then the first index that has it. On CUDA k
passes would be 2k launches per layer; there one stable sort is used (and `kernels.moe.router` uses
neither).

T rows, E values per row.
"""

import torch
from torch import Tensor

_NARROW = 24
"""Columns up to which `max` is faster (8: 0.08 ms against 0.16; 32: 0.41 against 0.20)."""


def top_indices(values_TE: Tensor, k: int) -> Tensor:
    """Indices `[T, k]` (int64) of the k largest values of every row, in descending order of value,
    then ascending order of index. Values above minus infinity: at least k per row."""
    if values_TE.device.type == "cuda":
        return values_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    rest_TE, found = values_TE.clone(), []
    first_best = _by_max if values_TE.shape[1] <= _NARROW else _by_comparison
    for _ in range(k):
        best_T1 = first_best(rest_TE)
        rest_TE.scatter_(1, best_T1, float("-inf"))
        found.append(best_T1)
    return torch.cat(found, dim=1)


def _by_max(values_TE: Tensor) -> Tensor:
    return values_TE.max(-1, keepdim=True).indices


def _by_comparison(values_TE: Tensor) -> Tensor:
    n = values_TE.shape[1]
    from_the_end_E = torch.arange(n, 0, -1, dtype=torch.float32, device=values_TE.device)
    hits_TE = torch.empty_like(values_TE, dtype=torch.float32)
    torch.ge(values_TE, values_TE.amax(-1, keepdim=True), out=hits_TE)
    first_T1 = n - hits_TE.mul_(from_the_end_E).amax(-1, keepdim=True).long()
    return first_T1.clamp_(max=n - 1)  # comparisons with NaN are false: any index will do


def top_indices_reference(values_TE: Tensor, k: int) -> Tensor:
    """Row by row, in Python."""
    n = values_TE.shape[1]
    rows = [sorted(range(n), key=lambda e: (-row[e], e))[:k] for row in values_TE.tolist()]
    return torch.tensor(rows, dtype=torch.int64).view(-1, k)
