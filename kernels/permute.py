"""Rows of tokens into rows grouped by expert, and back.

A token that visits K experts becomes K rows; rows of one expert lie together, in token order
(a stable sort, so the result is deterministic). Going there is a gather; coming back is a sum
over each token's K rows, written as a gather through the inverse permutation, so that neither
direction, nor either gradient, needs atomics: the gradient of each is the other.

Groups may start at a multiple of `align`; the slots between are zero rows, which the gather itself
writes, and which nothing reads back. A choice may name nobody (id E): where tokens have unequal
numbers of rows, and where a buffer of fixed size is not full.

Shapes: T tokens, K experts per token, R = T * K rows, P >= R slots, D width, E experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import device


@dataclass(frozen=True)
class Permutation:
    """Where the R routed rows lie in P slots."""

    order_P: Tensor
    """Flat index t * K + k of the row in every slot; 0 in empty slots."""
    inverse_R: Tensor
    """Slot of every flat index; 0 where it has none."""
    empty: Tensor | None
    """Slots to be zero, since they hold no row; None where there are none to clear."""
    ends_E: Tensor
    """End of every expert's slots, int64; slots from the last end on belong to nobody."""
    counts_E: Tensor
    """True rows of every expert, int64."""
    absent_R: Tensor | None = None
    """Which flat indices have no slot: nothing comes back for them. None: all have one."""


def count_choices(ids_TK: Tensor, n_experts: int) -> Tensor:
    """How often each expert is named, int64 `[E]`. (`bincount` would wait for a CUDA device.)"""
    flat_R = ids_TK.reshape(-1)
    return flat_R.new_zeros(n_experts).scatter_add_(0, flat_R, torch.ones_like(flat_R))


def permutation(
    ids_TK: Tensor, n_experts: int, align: int = 1, n_rows: int | None = None
) -> Permutation:
    """Group routed rows by expert, stably.

    ids_TK: expert of every (token, choice), int64, any shape; `n_experts` names nobody. Rows of
    nobody lie behind the last end, unless `n_rows`, the number of all others, leaves them out.
    With `align` > 1 the number of slots is read on the host.
    """
    flat_R = ids_TK.reshape(-1)
    sorted_R = torch.argsort(flat_R, stable=True)[:n_rows]
    absent_R = flat_R == n_experts if len(sorted_R) < len(flat_R) else None
    counts_E = count_choices(flat_R, n_experts + 1)[:-1]
    slot_of_sorted = torch.arange(len(sorted_R), device=flat_R.device)
    inverse_R = torch.zeros_like(flat_R)
    if align == 1:
        inverse_R[sorted_R] = slot_of_sorted
        return Permutation(sorted_R, inverse_R, None, counts_E.cumsum(0), counts_E, absent_R)
    padded_E = (counts_E + align - 1) // align * align
    ends_E = padded_E.cumsum(0)
    shift_E = (ends_E - padded_E) - (counts_E.cumsum(0) - counts_E)
    slot_of_sorted += shift_E[flat_R[sorted_R]]
    inverse_R[sorted_R] = slot_of_sorted
    n_slots = int(ends_E[-1])
    order_P = sorted_R.new_zeros(n_slots)
    order_P[slot_of_sorted] = sorted_R
    taken_P = torch.zeros(n_slots, dtype=torch.bool, device=flat_R.device)
    taken_P[slot_of_sorted] = True
    empty = (~taken_P).nonzero()[:, 0]
    return Permutation(order_P, inverse_R, empty, ends_E, counts_E, absent_R)


def gather_rows(x_TD: Tensor, to: Permutation) -> Tensor:
    """`rows_PD` with `rows[p] = x[order[p] // K]`, zero in empty slots; K = R / T.

    Differentiable in `x_TD`.
    """
    return _GatherRows.apply(x_TD, to)


def combine_rows(rows_PD: Tensor, back: Permutation, top_k: int) -> Tensor:
    """`y_TD` with `y[t] = sum_k rows[inverse[t * K + k]]`, rounded once; absent rows count as zero.
    Differentiable in rows."""
    return _CombineRows.apply(rows_PD, back, top_k)


def gather_rows_reference(x_TD: Tensor, to: Permutation) -> Tensor:
    """Plain-torch form of `gather_rows`."""
    n_rows = to.inverse_R.numel()
    top_k = n_rows // max(x_TD.shape[0], 1)
    n_slots = to.order_P.numel()
    rows_RD = _without(x_TD.repeat_interleave(top_k, 0), to.absent_R)
    # one slot more, for absent rows where there is no other
    return x_TD.new_zeros(n_slots + 1, x_TD.shape[1]).index_add(0, to.inverse_R, rows_RD)[:n_slots]


def combine_rows_reference(rows_PD: Tensor, back: Permutation, top_k: int) -> Tensor:
    """Plain-torch form of `combine_rows`."""
    padded = torch.cat([rows_PD, rows_PD.new_zeros(1, rows_PD.shape[1])])  # as above
    rows_RD = _without(padded.float()[back.inverse_R], back.absent_R)
    return rows_RD.unflatten(0, (-1, top_k)).sum(1).to(rows_PD.dtype)


def _without(rows_RD: Tensor, absent_R: Tensor | None) -> Tensor:
    return rows_RD if absent_R is None else rows_RD.masked_fill_(absent_R[:, None], 0)


def _gather(x_TD: Tensor, to: Permutation, top_k: int) -> Tensor:
    source = to.order_P if top_k == 1 else to.order_P // top_k
    rows_PD = x_TD.index_select(0, source)
    return rows_PD if to.empty is None else rows_PD.index_fill_(0, to.empty, 0)


def _combine(rows_PD: Tensor, back: Permutation, top_k: int) -> Tensor:
    if not len(rows_PD):
        return rows_PD.new_zeros(len(back.inverse_R) // top_k, rows_PD.shape[1])
    if rows_PD.device.type == "meta" and top_k > 1:  # what the Triton kernel allocates
        return rows_PD.new_empty(len(back.inverse_R) // top_k, rows_PD.shape[1])
    if device.on_accelerator(rows_PD) and top_k > 1:
        from kernels.permute_triton import combine

        with device.launching_on(rows_PD):
            return combine(rows_PD, back.inverse_R, back.absent_R, top_k)
    rows_RD = _without(rows_PD.index_select(0, back.inverse_R), back.absent_R)
    # torch sums bf16 in fp32 and rounds once
    return rows_RD if top_k == 1 else rows_RD.view(-1, top_k, rows_PD.shape[1]).sum(1)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, to: Permutation) -> Tensor:
        ctx.to, ctx.top_k = to, to.inverse_R.numel() // max(x_TD.shape[0], 1) or 1
        return _gather(x_TD, to, ctx.top_k)

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None]:
        return _combine(grad_PD, ctx.to, ctx.top_k), None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_PD: Tensor, back: Permutation, top_k: int) -> Tensor:
        ctx.back, ctx.top_k = back, top_k
        return _combine(rows_PD, back, top_k)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad_TD, ctx.back, ctx.top_k), None, None
