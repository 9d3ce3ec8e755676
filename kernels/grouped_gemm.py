"""Grouped GEMM: one matrix product per expert over rows that lie together.

`y[r] = x[r] @ w[e].T` for every row r of group e. Group e owns rows `[ends[e] - size, ends[e])`,
of which the first `counts[e]` are true rows; between a group's last true row and its end there may
be zero rows (alignment). Rows past the last end belong to nobody: they are neither read nor
defined in the output.

Dtype: the operands' (bf16 or fp32) with fp32 accumulation inside; gradients in the same dtype.
On CUDA this is `torch._grouped_mm`, which takes the group ends from device memory. On a CPU it is a
loop of `mm` into slices of one output. There, group sizes that differ at every step are the enemy:
oneDNN generates code for each shape it meets, so random sizes of 1 to 511 rows cost 3 to 5 us per
row where multiples of 32 cost 1.7 (D 256, N 512, forward and both gradients; 2-core AMD EPYC, one
thread, torch 2.13). `row_alignment` therefore asks for groups of whole multiples.

Shapes: R rows, N output width, D input width, E groups.
"""

from typing import Any

import torch
from torch import Tensor


def grouped_gemm_nt(x_RD: Tensor, w_END: Tensor, ends_E: Tensor, counts_E: Tensor) -> Tensor:
    """`y_RN`, with `y[r] = x[r] @ w[e].T` for the rows of group e. Differentiable in x and w.

    ends_E: int32 or int64, non-decreasing, at most R. counts_E: true rows per group, no more
    than the group is long.
    """
    if x_RD.device.type != "cpu":
        return torch._grouped_mm(x_RD, w_END.transpose(-2, -1), offs=ends_E.to(torch.int32))
    return _GroupedGemmLoop.apply(x_RD, w_END, _group_slices(ends_E, counts_E))


def row_alignment(n_rows: int, n_groups: int, device: torch.device) -> int:
    """What group sizes should be a multiple of, for `n_rows` rows in `n_groups` groups.

    1 where padding would cost more than it saves: on CUDA, and for small groups.
    """
    if device.type != "cpu" or n_rows < 128 * n_groups:
        return 1
    return 32


def grouped_gemm_nt_reference(
    x_RD: Tensor, w_END: Tensor, ends_E: Tensor, counts_E: Tensor
) -> Tensor:
    """Plain loops, fp32 products; rows outside every group are zero."""
    y_RN = x_RD.new_zeros(x_RD.shape[0], w_END.shape[1])
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        for r in range(start, start + int(counts_E[e])):
            y_RN[r] = (w_END[e].float() @ x_RD[r].float()).to(x_RD.dtype)
        start = end
    return y_RN


def _group_slices(ends_E: Tensor, counts_E: Tensor) -> list[slice]:
    """The rows that are multiplied: a group's zero rows with it, unless they are many."""
    ends = ends_E.tolist()
    starts = [0, *ends[:-1]]
    return [
        slice(start, end if end - start - n < 32 else start + n)
        for start, end, n in zip(starts, ends, counts_E.tolist(), strict=True)
    ]


class _GroupedGemmLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, w_END: Tensor, groups: list[slice]) -> Tensor:
        ctx.save_for_backward(x_RD, w_END)
        ctx.groups = groups
        y_RN = _zeros_outside(x_RD, w_END.shape[1], groups)
        for e, rows in enumerate(groups):
            if rows.stop > rows.start:
                torch.mm(x_RD[rows], w_END[e].T, out=y_RN[rows])
        return y_RN

    @staticmethod
    def backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_RD, w_END = ctx.saved_tensors
        grad_RN = grad_RN.contiguous()
        needs_x, needs_w, _ = ctx.needs_input_grad
        grad_x = _zeros_outside(grad_RN, x_RD.shape[1], ctx.groups) if needs_x else None
        grad_w = torch.empty_like(w_END) if needs_w else None
        for e, rows in enumerate(ctx.groups):
            if rows.stop == rows.start:
                if grad_w is not None:
                    grad_w[e].zero_()
                continue
            if grad_x is not None:
                torch.mm(grad_RN[rows], w_END[e], out=grad_x[rows])
            if grad_w is not None:
                torch.mm(grad_RN[rows].T, x_RD[rows], out=grad_w[e])
        return grad_x, grad_w, None


def _zeros_outside(like_R: Tensor, width: int, groups: list[slice]) -> Tensor:
    """An output whose rows outside all groups are zero; rows inside are still to be written."""
    covered = sum(rows.stop - rows.start for rows in groups)
    make = like_R.new_empty if covered == like_R.shape[0] else like_R.new_zeros
    return make(like_R.shape[0], width)
