"""Triton form of `kernels.permute.combine_rows`: each token's rows are read once and summed.

As torch operations it is a gather, which reads and writes all K rows of a token, and a sum, which
reads them again; here K rows are read and one is written. A program takes one token and a block of
its columns, and adds in fp32 in the order of choices: deterministic, no atomics. Offsets are
64-bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST_BLOCK = 1024


def combine(rows_PD: Tensor, inverse_R: Tensor, absent_R: Tensor | None, top_k: int) -> Tensor:
    """`y[t] = sum_k rows[inverse[t * K + k]]` over the k that are not absent; contiguous rows."""
    rows_PD, width = rows_PD.contiguous(), rows_PD.shape[1]
    n_tokens = len(inverse_R) // top_k
    y_TD = rows_PD.new_empty(n_tokens, width)
    if y_TD.numel():
        absent = None if absent_R is None else absent_R.view(torch.uint8)
        block = min(_LARGEST_BLOCK, triton.next_power_of_2(width))
        _combine[(n_tokens, triton.cdiv(width, block))](
            rows_PD, inverse_R, absent, y_TD, width, top_k,
            SOME_ABSENT=absent_R is not None, BLOCK=block,
        )  # fmt: skip
    return y_TD


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    rows_ptr, inverse_ptr, absent_ptr, y_ptr, width, top_k,
    SOME_ABSENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(top_k):
        choice = token * top_k + k
        columns_there = width
        if SOME_ABSENT:
            columns_there = tl.where(tl.load(absent_ptr + choice) != 0, 0, width)
        row = rows_ptr + tl.load(inverse_ptr + choice) * width
        total += tl.load(row + columns, mask=columns < columns_there, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * width + columns, total.to(y_ptr.dtype.element_ty), mask=inside)
