"""The k largest of each row, best first; of equal values the lowest index wins.

`torch.topk` promises no order among equals, and its kernels for CPU and CUDA differ. Routing needs
one: scores are equal where a sigmoid saturates or experts were copied, and a run must repeat bit
for bit. `argmax` returns the first of equals by contract, so k passes of it are exact, and on a CPU
as fast as `topk`. On CUDA that would be 2k launches per layer; there one stable sort does it.

T rows, E values per row.
"""

import torch
from torch import Tensor


def top_indices(values_TE: Tensor, k: int) -> Tensor:
    """Indices `[T, k]` (int64) of the k largest values of every row, in descending order of value,
    then ascending order of index. Values above minus infinity: at least k per row."""
    if values_TE.device.type == "cuda":
        return values_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    rest_TE, found = values_TE.clone(), []
    for _ in range(k):
        best_T1 = rest_TE.argmax(-1, keepdim=True)
        rest_TE.scatter_(1, best_T1, float("-inf"))
        found.append(best_T1)
    return torch.cat(found, dim=1)


def top_indices_reference(values_TE: Tensor, k: int) -> Tensor:
    """Row by row, in Python."""
    n = values_TE.shape[1]
    rows = [sorted(range(n), key=lambda e: (-row[e], e))[:k] for row in values_TE.tolist()]
    return torch.tensor(rows, dtype=torch.int64).view(-1, k)
