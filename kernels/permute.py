"""Rows of tokens into rows grouped by expert, and back.

A token that visits K experts becomes K rows; rows of one expert lie together, in token order
(a stable sort, so the result is deterministic). Going there is a gather; coming back is a sum
over each token's K rows, written as a gather through the inverse permutation, so that neither
direction, nor either gradient, needs atomics: the gradient of each is the other.

Shapes: T tokens, K experts per token, R = T * K rows, D width, E experts.
"""

from typing import Any

import torch
from torch import Tensor


def expert_order(ids_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each routed row goes.

    ids_TK: expert of every (token, choice), any integer dtype.
    Returns `order_R` (row -> flat index t * K + k, grouped by expert, stable), `inverse_R`
    (flat index -> row) and `counts_E` (rows per expert, int64).
    """
    flat_R = ids_TK.reshape(-1)
    order_R = torch.argsort(flat_R, stable=True)
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    return order_R, inverse_R, torch.bincount(flat_R, minlength=n_experts)


def gather_rows(x_TD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """`rows[r] = x[order[r] // K]` with K = R / T. Differentiable in `x_TD`."""
    return _GatherRows.apply(x_TD, order_R, inverse_R)


def combine_rows(rows_RD: Tensor, order_R: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
    """`y[t] = sum_k rows[inverse[t * K + k]]`, summed in fp32. Differentiable in `rows_RD`."""
    return _CombineRows.apply(rows_RD, order_R, inverse_R, top_k)


def gather_rows_reference(x_TD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """Plain-torch form of `gather_rows`."""
    return x_TD[order_R // max(order_R.numel() // max(x_TD.shape[0], 1), 1)]


def combine_rows_reference(
    rows_RD: Tensor, order_R: Tensor, inverse_R: Tensor, top_k: int
) -> Tensor:
    """Plain-torch form of `combine_rows`."""
    y_TD = rows_RD.new_zeros(rows_RD.shape[0] // top_k, rows_RD.shape[1], dtype=torch.float32)
    return y_TD.index_add(0, order_R // top_k, rows_RD.float()).to(rows_RD.dtype)


def _gather(x_TD: Tensor, order_R: Tensor, top_k: int) -> Tensor:
    return x_TD.index_select(0, order_R // top_k)


def _combine(rows_RD: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
    if top_k == 1:
        return rows_RD.index_select(0, inverse_R)
    width = rows_RD.shape[1]
    # torch sums bf16 in fp32 and rounds once
    return rows_RD.index_select(0, inverse_R).view(-1, top_k, width).sum(1)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.top_k = order_R.numel() // max(x_TD.shape[0], 1) or 1
        ctx.save_for_backward(inverse_R)
        return _gather(x_TD, order_R, ctx.top_k)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return _combine(grad_RD, inverse_R, ctx.top_k), None, None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, order_R: Tensor, inverse_R: Tensor, top_k: int
    ) -> Tensor:
        ctx.top_k = top_k
        ctx.save_for_backward(order_R)
        return _combine(rows_RD, inverse_R, top_k)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, None]:
        (order_R,) = ctx.saved_tensors
        return _gather(grad_TD, order_R, ctx.top_k), None, None, None
