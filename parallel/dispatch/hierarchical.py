"""Two-level dispatch: a token is sent to each node once and distributed there.

Links between nodes are several times slower than those within. The flat exchange sends a token
between nodes once per chosen expert; here it is sent once to every node that has one of its
experts, to the rank with the same index in that node, which forwards it within the node. For the
results a node first sums the outputs of its experts for a token, so one row returns. With routing
limited to M nodes (DeepSeek-V3, arXiv:2412.19437, section 2.1.2) a token is sent between nodes at
most M times, for any number of experts.

With the row its K routing weights and expert ids are sent, 8 K bytes, from which a node selects its
own experts. After one all-gather of counts every rank has all splits of both levels; they are read
on the host once. A sum is rounded twice, in the node and over nodes. FP8 rows are quantized once
when sent to experts; results are quantized only between nodes.

Rank r of the group has index r % m in node r // m, and experts r * e up to (r + 1) * e.

T tokens, U tokens received by this rank from all nodes, K experts per token, N nodes, m ranks per
node, E experts, F experts of one node, e of one rank, C chunks, R rows sent and S rows received in
the node, P slots, J = 2 K.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.moe.permute import Permutation, combine_rows, count_choices, gather_rows, permutation
from models.step_context import DispatchStats
from parallel.dispatch.all_to_all import expert_major
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


class Splits(NamedTuple):
    """Rows to and from every rank of a group."""

    sent: list[int]
    got: list[int]


@dataclass(frozen=True)
class Hierarchical:
    """`Planner` for nodes of ranks. Group `across` has the ranks of one index, `within` of a
    node."""

    n_experts: int
    group: dist.ProcessGroup
    across: RowAllToAll
    within: RowAllToAll
    align: int = 1

    def plan(
        self, ids: list[Tensor], stats: DispatchStats, exact: bool = False
    ) -> list[DispatchPlan]:
        n_nodes, m, me = self.across.size, self.within.size, self.group.rank()
        node, place = divmod(me, m)
        nodes = [_nodes_of(ids_TK, self.n_experts, n_nodes) for ids_TK in ids]
        mine_C = [
            torch.cat([count_choices(i, self.n_experts), count_choices(n, n_nodes + 1)[:-1]])
            for i, n in zip(ids, nodes, strict=True)
        ]
        counts = _all_gather(torch.stack(mine_C), self.group).unflatten(0, (n_nodes, m))
        rows_NmCE, tokens_NmCN = counts.split([self.n_experts, n_nodes], -1)
        # rows that this node's rank of every index receives from all nodes, per local expert
        here_mCme = rows_NmCE.unflatten(-1, (n_nodes, m, -1))[:, :, :, node].sum(0)
        to_all = tokens_NmCN[node, place], tokens_NmCN[:, place, :, node].T
        fan = here_mCme[place].sum(-1), here_mCme[:, :, place].sum(-1).T
        own = rows_NmCE[node, place].unflatten(-1, (n_nodes * m, -1))[:, me].sum(-1, keepdim=True)
        widths = [n_nodes, n_nodes, m, m, 1]
        plans: list[DispatchPlan] = []
        for c, row in enumerate(torch.cat([*to_all, *fan, own], 1).tolist()):  # the only wait
            ends = list(accumulate(widths))
            *splits, (at_home,) = (row[b - w : b] for b, w in zip(ends, widths, strict=True))
            level_1, level_2 = Splits(*splits[:2]), Splits(*splits[2:])
            to_nodes = permutation(nodes[c], n_nodes, n_rows=sum(level_1.sent))
            by_expert = expert_major(here_mCme[:, c, place], sum(level_2.got), self.align)
            plans.append(TwoLevelPlan(self, stats, ids[c], to_nodes, level_1, level_2, by_expert))
            stats.rows_sent += ids[c].numel() - at_home
            stats.rows_received += sum(level_2.got)
        return plans

    def choices_here(self, ids_UK: Tensor) -> Tensor:
        """Ids of experts relative to the first of this node; F for experts of other nodes."""
        per_node = self.n_experts // self.across.size
        here_UK = ids_UK - self.across.group.rank() * per_node
        return torch.where((here_UK >= 0) & (here_UK < per_node), here_UK, per_node)


@dataclass
class TwoLevelPlan:
    """The exchange between nodes, then to the ranks of experts, then by expert; and the
    transpose."""

    planner: Hierarchical
    stats: DispatchStats
    ids_TK: Tensor
    to_nodes: Permutation
    level_1: Splits
    level_2: Splits
    by_expert: Permutation
    to_ranks: Permutation | None = None
    """Permutation from the U local tokens to R rows, derived from the expert ids sent with them."""

    def __post_init__(self) -> None:
        self.ends_e, self.counts_e = self.by_expert.ends_E, self.by_expert.counts_E
        self.top_k = self.ids_TK.shape[1]
        self.nodes_per_token = min(self.planner.across.size, self.top_k)

    def start_dispatch(
        self, x_TD: Tensor, weights_TK: Tensor | None, wire: WireFormat
    ) -> PendingRows:
        extra = None
        if weights_TK is not None:  # not in backward, when the ids have already arrived
            extra_TJ = torch.cat([weights_TK, self.ids_TK.to(weights_TK.dtype)], 1)
            extra = gather_rows(extra_TJ, self.to_nodes)
        leaving = pack(x_TD, wire).gathered(self.to_nodes, extra)
        return self.planner.across.start(leaving, *self.level_1, self.stats)

    def finish_dispatch(self, handle: PendingRows) -> PackedRows:
        arrived, weights_UK = handle.wait(), None
        if arrived.extra is not None:
            weights_UK, ids_UK = arrived.extra.split(self.top_k, 1)
            here_UK = self.planner.choices_here(ids_UK.long())
            n_here = self.planner.n_experts // self.planner.across.size
            self.to_ranks = permutation(here_UK, n_here, n_rows=sum(self.level_2.sent))
        assert self.to_ranks is not None
        fanned = arrived.gathered(self.to_ranks, per_choice(weights_UK, self.to_ranks))
        rows = self.planner.within.start(fanned, *self.level_2, self.stats).wait()
        return rows.gathered(self.by_expert, per_choice(rows.extra, self.by_expert))

    def start_combine(
        self, rows_PD: Tensor, weights_P: Tensor | None, wire: WireFormat
    ) -> PendingRows:
        assert self.to_ranks is not None
        rows_SD = combine_rows(rows_PD, self.by_expert, 1)
        extra_S = to_choices(weights_P, self.by_expert, 1)
        sent, got = self.level_2
        leaving = PackedRows(rows_SD, None, extra_S)
        summed = self.planner.within.start(leaving, got, sent, self.stats).wait()
        tokens_UD = combine_rows(summed.data, self.to_ranks, self.top_k)
        weights_UK = to_choices(summed.extra, self.to_ranks, self.top_k)
        sent, got = self.level_1
        return self.planner.across.start(pack(tokens_UD, wire, weights_UK), got, sent, self.stats)

    def finish_combine(self, handle: PendingRows, dtype: torch.dtype) -> CombinedRows:
        arrived = handle.wait()
        y_TD = combine_rows(arrived.values(dtype), self.to_nodes, self.nodes_per_token)
        if arrived.extra is None:
            return CombinedRows(y_TD, None)
        # each choice has its number in one node's row and zero in the others
        weights_TK = combine_rows(arrived.extra, self.to_nodes, self.nodes_per_token)
        return CombinedRows(y_TD, weights_TK)


def _nodes_of(ids_TK: Tensor, n_experts: int, n_nodes: int) -> Tensor:
    """The nodes of a token's experts, each once, `[T, min(N, K)]`; the remaining entries are N."""
    nodes_TK = ids_TK // (n_experts // n_nodes)
    visited_TN = ids_TK.new_full((len(ids_TK), n_nodes), n_nodes)
    return visited_TN.scatter_(1, nodes_TK, nodes_TK).sort(1).values[:, : ids_TK.shape[1]]


def _all_gather(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[ranks, ...]`."""
    out = mine.new_empty(dist.get_world_size(group), *mine.shape)
    dist.all_gather(list(out), mine, group=group)
    return out
