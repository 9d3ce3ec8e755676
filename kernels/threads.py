"""Shapes for which torch's element-wise operations give every row the same bits on a CPU.

An element-wise operation cuts its elements into one contiguous piece per thread and processes 32
at a time; the remainder of a row, or of a piece, is computed by scalar code, whose exponential may
differ from the vectors' in the last bit (torch 2.13: sigmoid and silu). If pieces end at ends of
rows, the code path of an element depends on its column alone, so a row's result does not depend on
the number of rows.
"""

import torch

VECTOR = 32
"""Largest number of elements that element-wise operations process together."""
_GRAIN = 32768
"""Number of elements below which torch starts no other thread (`at::internal::GRAIN_SIZE`)."""


def whole_rows(n_rows: int, width: int) -> int:
    """The least number of rows, at least `n_rows`, whose pieces end at ends of rows."""
    while n_rows % _pieces(n_rows * width):
        n_rows += 1
    return n_rows


def _pieces(n_elements: int) -> int:
    return max(min(torch.get_num_threads(), -(-n_elements // _GRAIN)), 1)
