"""Exact all-to-all dispatch: every row travels to the rank of its expert and back.

Expert e lives on rank `e // (E / ep)`. Rows are sorted by expert, hence by rank. The ranks first
exchange how many rows each expert gets (one small all-to-all, read on the host because uneven
splits are host arguments), then the rows and their routing weights. They arrive ordered by sender
and, within a sender, by expert; one more gather orders them by expert. No row is dropped or
padded, whatever the router chose. The shared experts run while the rows are on their way.

T tokens, K experts per token, R rows sent, S rows received, D width, E experts, e local experts.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.permute import combine_rows, expert_order, gather_rows
from models.moe import ExpertsFn, Rows


class AllToAllDispatcher:
    """`models.moe.Dispatcher` over the expert-parallel group."""

    def __init__(self, n_experts: int, group: dist.ProcessGroup) -> None:
        self.n_experts, self.group = n_experts, group
        self.ep = dist.get_world_size(group)

    def run(
        self,
        x_TD: Tensor,
        expert_ids_TK: Tensor,
        weights_TK: Tensor,
        experts: ExpertsFn,
        beside: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        order_R, inverse_R, counts_E = expert_order(expert_ids_TK, self.n_experts)
        received_re = torch.empty_like(counts_E)
        dist.all_to_all_single(received_re, counts_E, group=self.group)
        received_re = received_re.view(self.ep, -1)
        sent = counts_E.view(self.ep, -1).sum(1).tolist()
        got = received_re.sum(1).tolist()

        pending: list[dist.Work] = []
        rows_RD = gather_rows(x_TD, order_R, inverse_R)
        rows_SD = _AllToAll.apply(rows_RD, sent, got, self.group, pending)
        weights_R = weights_TK.reshape(-1)[order_R]
        weights_S = _AllToAll.apply(weights_R, sent, got, self.group, pending)
        shared_TD = None if beside is None else beside()
        for work in pending:
            work.wait()

        by_expert_S, by_sender_S = _expert_major(received_re)
        counts_e = received_re.sum(0)
        rows = Rows(
            data=gather_rows(rows_SD, by_expert_S, by_sender_S),
            scales=None,
            weights_R=weights_S[by_expert_S],
            ends_e=counts_e.cumsum(0),
            counts_e=counts_e,
        )
        done_SD = gather_rows(experts(rows), by_sender_S, by_expert_S)
        done_RD = _AllToAll.apply(done_SD, got, sent, self.group, None)
        y_TD = combine_rows(done_RD, order_R, inverse_R, expert_ids_TK.shape[1])
        return y_TD if shared_TD is None else y_TD + shared_TD


def _expert_major(received_re: Tensor) -> tuple[Tensor, Tensor]:
    """Permutation of the received rows from (sender, expert) to (expert, sender) order.

    received_re: rows from each rank for each local expert. Returns the permutation and its inverse.
    """
    ep, n_local = received_re.shape
    experts = torch.arange(n_local, device=received_re.device).repeat(ep)
    expert_of_row = experts.repeat_interleave(received_re.reshape(-1))
    order, inverse, _ = expert_order(expert_of_row, n_local)
    return order, inverse


class _AllToAll(torch.autograd.Function):
    """Uneven all-to-all of rows; its gradient is the all-to-all with the splits exchanged.

    With a list for `pending` the forward exchange is left running and its handle appended: the
    output must not be read before the handle was waited for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        sent: list[int],
        got: list[int],
        group: dist.ProcessGroup,
        pending: list[dist.Work] | None,
    ) -> Tensor:
        ctx.splits, ctx.group = (sent, got), group
        out = x.new_empty(sum(got), *x.shape[1:])
        work = dist.all_to_all_single(
            out, x.contiguous(), got, sent, group=group, async_op=pending is not None
        )
        if pending is not None:
            pending.append(work)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        sent, got = ctx.splits
        out = grad.new_empty(sum(sent), *grad.shape[1:])
        dist.all_to_all_single(out, grad.contiguous(), sent, got, group=ctx.group)
        return out, None, None, None, None
