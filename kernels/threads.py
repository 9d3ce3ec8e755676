"""Shapes for which torch's element-wise operations give every row the same bits on a CPU.

An element-wise operation cuts its elements into one contiguous piece per thread and takes them 32
at a time; what is left at the end of a row, or of a piece, goes through scalar code, whose
exponential may differ from the vectors' in the last bit (torch 2.13: sigmoid and silu). Where
pieces end at ends of rows, which code an element meets depends on its column alone, so a row's
result does not depend on how many rows there are.
"""

import torch

VECTOR = 32
"""Elements that element-wise operations take together at most."""
_GRAIN = 32768
"""Elements below which torch does not start another thread (`at::internal::GRAIN_SIZE`)."""


def whole_rows(n_rows: int, width: int) -> int:
    """The least number of rows, at least `n_rows`, that torch cuts between rows."""
    while n_rows % _pieces(n_rows * width):
        n_rows += 1
    return n_rows


def _pieces(n_elements: int) -> int:
    return max(min(torch.get_num_threads(), -(-n_elements // _GRAIN)), 1)
