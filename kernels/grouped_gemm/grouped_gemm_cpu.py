"""Products of groups of rows on a CPU, with few different numbers of rows.

oneDNN, which multiplies bf16 on a CPU, generates code for every new shape: that takes 0.4 to 0.8 ms
on an AMD EPYC with AVX512-BF16, and more on a CPU with AMX, while the product of 500
rows with a matrix of 512x256 takes 0.3 on the former (one thread, torch 2.13). It caches the code
of 1,024 shapes, but group sizes differ at every step: a training step of the demo model (4 layers
of 8 experts, six products each) had 250 new shapes and spent a quarter of its time on them. So
numbers of rows are rounded up, to one of 8 to 32 sizes per octave: 8 add 4 percent of rows on
average, 32 add 1 percent. Which of them, follows from both costs, measured at the first product of
a process; results do not depend on it, because added zeros and neighbors change no bit. The sizes
are closer together if the matrix is so large that the added rows cost more than generating code.

If outputs have a row for each row, the added rows are those of the following groups, and their
outputs are overwritten when those groups are computed: nothing is copied. If rows are summed over,
they are copied and padded with zeros. Dtypes other than bf16 use libraries that generate no code.

For a small remainder of rows both libraries sum in another order (MKL 2024.2 for a remainder of
less than 4, with 2 threads 5 rows are 4 and 1; oneDNN 3.12 for less than 4 rows of 24 values);
otherwise a row's bits do not depend on the number of rows, except that oneDNN with AMX cuts sums of
512 and more values into parts that do. So up to 64 rows are rounded up to a multiple of 8, and an
expert's output for a token does not depend on its number of other tokens (with AMX: if the width
is less than 512).

Shapes: R rows, M rows of one group, N output width, K input width, E groups.
"""

import functools
import statistics
import time
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

_COPY_NS = 0.1
"""Time of the copy of an element, in nanoseconds."""
_LEAST_CODE_NS = 1e5
"""Generating code is never taken to be faster: a busy machine can make two times equal."""
_SLOW_NS = 1e5
"""A product of 65 rows with 64x64 takes longer on a CPU for which torch has no fast bf16 product:
0.2 ms on an AMD EPYC with AVX2 alone (torch 2.13), against some microseconds."""
_USES = 16
"""Sizes are less than 32 per octave where code costs at least so many times what the added rows
do."""
_FEW_ROWS, ALIKE = 64, 8
"""Numbers of rows up to the first are multiples of the second."""


def multiply_rows(x_RK: Tensor, w_ENK: Tensor, groups: list[slice], y_RN: Tensor) -> None:
    """`y[r] = x[r] @ w[e].T` for the rows of group e; the groups are in ascending order.

    Rows between groups must be zero, and their outputs become zero; rows from the end of the last
    group on are neither read nor written.
    """
    end = groups[-1].stop if groups else 0
    for rows, w_NK in zip(groups, w_ENK, strict=True):
        size = rows.stop - rows.start
        if not size:
            continue
        n = max(_rounded(x_RK, size, *w_NK.shape), _alike(size))
        if rows.start + n <= end:
            window = slice(rows.start, rows.start + n)
        elif n <= end:
            window = slice(end - n, end)
        else:
            y_RN[rows] = torch.mm(_followed_by_zeros(x_RK[rows], n), w_NK.T)[:size]
            continue
        if window.start == rows.start:
            torch.mm(x_RK[window], w_NK.T, out=y_RN[window])
        else:  # includes rows of earlier groups, whose outputs are complete
            first = rows.start - window.start
            y_RN[rows] = torch.mm(x_RK[window], w_NK.T)[first : first + size]
    for before, after in pairwise(groups):  # zero times an infinite weight is NaN
        if before.stop < after.start:
            y_RN[before.stop : after.start] = 0


def multiply(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor) -> None:
    """`out = a @ b`, rounded to out's dtype."""
    M, (K, N) = len(a_MK), b_KN.shape
    n = max(_rounded(a_MK, M, N, K, copied=K + N), _alike(M))
    _product(_followed_by_zeros(a_MK, n), b_KN, out_MN)


def sum_over_rows(a_MN: Tensor, b_MK: Tensor, out_NK: Tensor) -> None:
    """`out = a.T @ b`, rounded to out's dtype."""
    M, N, K = *a_MN.shape, b_MK.shape[1]
    n = _rounded(a_MN, M, N, K, copied=K + N)
    _product(_followed_by_zeros(a_MN, n).T, _followed_by_zeros(b_MK, n), out_NK)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if len(a) == len(out) and a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b)[: len(out)])


class Costs(NamedTuple):
    """Times of bf16 products on this CPU, in nanoseconds."""

    code: float
    """To generate code for a new shape."""
    operation: float
    """Of one floating-point operation."""


@functools.cache
def measured_costs() -> Costs:
    """Costs on this machine, with its current number of threads: takes about 20 ms, once per
    process. CPU times of this thread, which other processes hardly change."""
    n_first, width = 1001, 256
    if min(_times(65, 64)[1:]) > _SLOW_NS:  # those products would take seconds
        n_first, width = 65, 64
    code, product = [], []
    for n_rows in range(n_first, n_first + 7 * 2, 2):  # no group is rounded to an odd number
        times = _times(n_rows, width)
        product.append(min(times[1:]))
        code.append(times[0] - product[-1])
    return Costs(
        max(statistics.median(code), _LEAST_CODE_NS),
        min(product) / (2 * n_first * width**2),
    )


def _times(n_rows: int, width: int) -> list[int]:
    """Times of a bf16 product with a square matrix, the first time and then twice again."""
    x_MK = torch.zeros(n_rows, width, dtype=torch.bfloat16)
    w_KN = torch.zeros(width, width, dtype=torch.bfloat16)
    times = []
    for _ in range(3):
        start = time.thread_time_ns()
        torch.mm(x_MK, w_KN)
        times.append(time.thread_time_ns() - start)
    return times


def _rounded(like: Tensor, n_rows: int, N: int, K: int, copied: int = 0) -> int:
    """Number of rows to multiply instead of `n_rows`, if each added row copies `copied` elements.
    It is `n_rows` if more rows would cost more than generating code."""
    if like.dtype != torch.bfloat16:
        return n_rows
    return rounded_up(n_rows, N, K, copied, measured_costs())


def rounded_up(n_rows: int, N: int, K: int, copied: int, costs: Costs) -> int:
    """`_rounded` for bf16, at these costs."""
    if n_rows * copied * _COPY_NS > costs.code:
        return n_rows
    row = max(2 * N * K * costs.operation, 1e-9)
    octave = (n_rows - 1).bit_length()
    # steps of 1/32 octave that cost at most what code does, or of 1/8 that cost much less
    fine = min(octave - 6, int(costs.code / row).bit_length() - 1)
    coarse = min(octave - 4, int(costs.code / row / _USES).bit_length() - 1)
    step = 1 << max(fine, coarse, 0)
    return -(-n_rows // step) * step


def _alike(n_rows: int) -> int:
    """Least number of rows for which each of `n_rows` has the same bits as among more rows."""
    return n_rows if n_rows > _FEW_ROWS else -(-n_rows // ALIKE) * ALIKE


def _followed_by_zeros(x_MK: Tensor, n_rows: int) -> Tensor:
    if len(x_MK) == n_rows:
        return x_MK
    padded = x_MK.new_empty(n_rows, x_MK.shape[1])
    padded[: len(x_MK)] = x_MK
    padded[len(x_MK) :] = 0
    return padded
