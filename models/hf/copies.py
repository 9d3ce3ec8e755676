"""Weights that a folder contains twice: one copy is ignored only if both have the same numbers."""

from collections.abc import Callable

import torch
from torch import Tensor


def same_rows(
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    read: tuple[Callable[[int, int], Tensor], Callable[[int, int], Tensor]],
    piece_bytes: int,
) -> bool:
    """Whether two tensors have the same numbers, in any precision; NaN equals nothing.

    read: returns rows [start, stop) of each. At most `piece_bytes` of each, in fp32, are in memory.
    """
    if shapes[0] != shapes[1] or not shapes[0]:
        return False
    n_rows, *row = shapes[0]
    rows = max(1, piece_bytes // max(4 * int(torch.Size(row).numel()), 1))
    for a in range(0, n_rows, rows):
        stop = min(a + rows, n_rows)
        first, second = (part(a, stop).float().clone() for part in read)
        if not torch.equal(first, second):
            return False
    return True
