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

from kernels.grouped_gemm import row_alignment
from kernels.permute import Permutation, combine_rows, permutation
from models.moe import ExpertsFn, rows_for


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
        to = permutation(expert_ids_TK, self.n_experts)
        received_re = torch.empty_like(to.counts_E)
        dist.all_to_all_single(received_re, to.counts_E, group=self.group)
        received_re = received_re.view(self.ep, -1)
        splits = torch.stack([to.counts_E.view(self.ep, -1).sum(1), received_re.sum(1)])
        sent, got = splits.tolist()  # the one wait for the device

        pending: list[dist.Work] = []
        leaving = rows_for(x_TD, weights_TK, to)
        data_SD = _AllToAll.apply(leaving.data, sent, got, self.group, pending)
        weights_S = _AllToAll.apply(leaving.weights_R, sent, got, self.group, pending)
        shared_TD = None if beside is None else beside()
        for work in pending:
            work.wait()

        by_expert = _expert_major(received_re, sum(got))
        done_PD = experts(rows_for(data_SD, weights_S, by_expert))
        done_SD = combine_rows(done_PD, by_expert, 1)
        done_RD = _AllToAll.apply(done_SD, got, sent, self.group, None)
        y_TD = combine_rows(done_RD, to, expert_ids_TK.shape[1])
        return y_TD if shared_TD is None else y_TD + shared_TD


def _expert_major(received_re: Tensor, n_rows: int) -> Permutation:
    """The received rows, which lie by sender and then expert, by expert and then sender.

    received_re: rows from each rank for each local expert, `n_rows` in all.
    """
    ep, n_local = received_re.shape
    experts = torch.arange(n_local, device=received_re.device).repeat(ep)
    expert_of_row_S = experts.repeat_interleave(received_re.reshape(-1), output_size=n_rows)
    align = row_alignment(n_rows, n_local, received_re.device)
    return permutation(expert_of_row_S, n_local, align)


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
