"""Exact all-to-all dispatch: every row is sent to the rank of its expert and its result back.

Expert e is on rank `e // (E / ep)`. Rows are sorted by expert, hence by rank. The ranks first
exchange the number of rows per expert (one small all-to-all for all chunks, read on the host
because uneven splits are host arguments), then the rows and their routing weights. Rows arrive
ordered by sender and, within a sender, by expert; one more gather orders them by expert. No row is
ever dropped or padded. The backward pass exchanges no counts, since it has the same splits.

T tokens, K experts per token, R rows sent, S rows received, P slots, D width, E experts,
e local experts, C chunks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.moe.permute import Permutation, combine_rows, permutation
from models.step_context import DispatchStats
from parallel.dispatch.packed_rows import (
    PackedRows,
    PendingRows,
    RowAllToAll,
    WireFormat,
    pack,
    per_choice,
    to_choices,
)
from parallel.dispatch.plan import CombinedRows, DispatchPlan


@dataclass(frozen=True)
class AllToAll:
    """`Planner` over the expert-parallel group."""

    n_experts: int
    comm: RowAllToAll
    align: int = 1

    def plan(
        self, ids: list[Tensor], stats: DispatchStats, exact: bool = False
    ) -> list[DispatchPlan]:
        ep, me = self.comm.size, self.comm.group.rank()
        to = [permutation(ids_TK, self.n_experts) for ids_TK in ids]
        sent_rCe = torch.stack([each.counts_E.view(ep, -1) for each in to], 1)
        got_rCe = self.comm.exchange_counts(sent_rCe)
        splits = torch.stack([sent_rCe.sum(2).T, got_rCe.sum(2).T], 1)
        plans: list[DispatchPlan] = []
        top_k = ids[0].shape[1]
        for c, (sent, got) in enumerate(splits.tolist()):  # the only wait for the device
            by_expert = expert_major(got_rCe[:, c], sum(got), self.align)
            plans.append(DirectPlan(self.comm, stats, to[c], by_expert, sent, got, top_k))
            stats.rows_sent += sum(sent) - sent[me]
            stats.rows_received += sum(got)
        return plans


def expert_major(received_re: Tensor, n_rows: int, align: int) -> Permutation:
    """Permutation of the received rows from (sender, expert) order to (expert, sender) order.

    received_re: rows from each rank for each local expert, `n_rows` in total.
    """
    n_ranks, n_local = received_re.shape
    experts = torch.arange(n_local, device=received_re.device).repeat(n_ranks)
    expert_of_row_S = experts.repeat_interleave(received_re.reshape(-1), output_size=n_rows)
    return permutation(expert_of_row_S, n_local, align)


@dataclass
class DirectPlan:
    """One exchange: tokens to R rows by rank, S rows received, these ordered by expert."""

    comm: RowAllToAll
    stats: DispatchStats
    to: Permutation
    by_expert: Permutation
    sent: list[int] | None
    got: list[int] | None
    """Rows to and from every rank; None: the same number for each."""
    top_k: int

    def __post_init__(self) -> None:
        self.ends_e, self.counts_e = self.by_expert.ends_E, self.by_expert.counts_E

    def start_dispatch(
        self, x_TD: Tensor, weights_TK: Tensor | None, wire: WireFormat
    ) -> PendingRows:
        leaving = pack(x_TD, wire).gathered(self.to, per_choice(weights_TK, self.to))
        return self.comm.start(leaving, self.sent, self.got, self.stats)

    def finish_dispatch(self, handle: PendingRows) -> PackedRows:
        rows = handle.wait()
        return rows.gathered(self.by_expert, per_choice(rows.extra, self.by_expert))

    def start_combine(
        self, rows_PD: Tensor, weights_P: Tensor | None, wire: WireFormat
    ) -> PendingRows:
        rows_SD = combine_rows(rows_PD, self.by_expert, 1)
        leaving = pack(rows_SD, wire, to_choices(weights_P, self.by_expert, 1))
        return self.comm.start(leaving, self.got, self.sent, self.stats)

    def finish_combine(self, handle: PendingRows, dtype: torch.dtype) -> CombinedRows:
        rows = handle.wait()
        y_TD = combine_rows(rows.values(dtype), self.to, self.top_k)
        return CombinedRows(y_TD, to_choices(rows.extra, self.to, self.top_k))
