"""Dispatch without host synchronization: every rank sends every other a buffer of the same size.

Uneven all-to-alls need their splits on the host: one wait per layer, during which the device idles,
and which no CUDA graph can contain. Here a rank has a capacity of C rows from each rank, C a fixed
multiple of the even share; a buffer that is not full is padded. Group ends stay on the
device, where the grouped GEMM reads them.

A router may choose more than C. The excess rows are not sent, and their number is added up on the
device; `parallel.dispatch.overflow` reads it once per step, before any state has changed, and the
step is repeated exactly, or the run stops. So rows are never dropped silently. (GShard,
arXiv:2006.16668, drops; a buffer for the worst case is the third choice: `capacity_factor` = ep
ranks.) Validation cannot be repeated, so it uses the exact exchange.

All ranks must have the same number of tokens, since C depends on it.

T tokens, K experts per token, R = T * K rows, S = ep * C slots, E experts, e local experts.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.moe.permute import Permutation, permutation
from models.step_context import DispatchStats
from parallel.dispatch.all_to_all import AllToAll, DirectPlan
from parallel.dispatch.packed_rows import RowAllToAll
from parallel.dispatch.plan import DispatchPlan


@dataclass(frozen=True)
class SyncFree:
    """`Planner` with buffers of fixed size."""

    n_experts: int
    comm: RowAllToAll
    capacity_factor: float
    align: int = 1

    def capacity(self, n_rows: int, top_k: int) -> int:
        """Rows that one rank may send to another, of its `n_rows`."""
        even = n_rows / self.comm.size
        most = n_rows // top_k * min(top_k, self.n_experts // self.comm.size)
        return min(math.ceil(self.capacity_factor * even), most)

    def plan(
        self, ids: list[Tensor], stats: DispatchStats, exact: bool = False
    ) -> list[DispatchPlan]:
        """exact: use the exchange that waits for the device."""
        if exact:
            return AllToAll(self.n_experts, self.comm, self.align).plan(ids, stats)
        return [self._plan(ids_TK, stats) for ids_TK in ids]

    def _plan(self, ids_TK: Tensor, stats: DispatchStats) -> DispatchPlan:
        ep, top_k = self.comm.size, ids_TK.shape[1]
        room = self.capacity(ids_TK.numel(), top_k)
        every = permutation(ids_TK, self.n_experts)
        wanted_re = every.counts_E.view(ep, -1)
        kept_re = _first(wanted_re, room)
        got_re = self.comm.exchange_counts(kept_re)
        self._count(wanted_re, kept_re, got_re, room, stats)
        to = _into_buffers(every, wanted_re.sum(1), room)
        by_expert = permutation(_expert_of_slot(got_re, room), got_re.shape[1], self.align)
        return DirectPlan(self.comm, stats, to, by_expert, None, None, top_k)

    def _count(
        self, wanted_re: Tensor, kept_re: Tensor, got_re: Tensor, room: int, stats: DispatchStats
    ) -> None:
        own = kept_re[self.comm.group.rank()]
        stats.on_device(wanted_re)
        stats.rows_without_room += (wanted_re - kept_re).sum()
        stats.rows_sent += kept_re.sum() - own.sum()
        stats.rows_received += got_re.sum()
        stats.max_rows = wanted_re.sum(1).max().clamp(min=stats.max_rows)
        stats.capacity = room


def _first(counts_re: Tensor, room: int) -> Tensor:
    """The number of each rank's experts' rows, in this order, that fit."""
    ends_re = counts_re.cumsum(1).clamp(max=room)
    return ends_re.diff(dim=1, prepend=ends_re.new_zeros(len(ends_re), 1))


def _into_buffers(every: Permutation, wanted_r: Tensor, room: int) -> Permutation:
    """From rows packed by expert to rows in one buffer of `room` slots per rank.

    Slots without a row are sent as zeros and not read.
    """
    n_slots = room * len(wanted_r)
    row_R = torch.arange(len(every.order_P), device=wanted_r.device)
    ends_r = wanted_r.cumsum(0)
    rank_R = torch.searchsorted(ends_r, row_R, right=True)
    place_R = row_R - (ends_r - wanted_r)[rank_R]
    fits_R = place_R < room
    slot_R = torch.where(fits_R, rank_R * room + place_R, n_slots)
    order_P = every.order_P.new_full((n_slots + 1,), -1)  # the last is for rows that do not fit
    order_P[slot_R] = every.order_P
    inverse_R = torch.empty_like(slot_R)
    inverse_R[every.order_P] = torch.where(fits_R, slot_R, -1)
    return Permutation(order_P[:-1], inverse_R, every.ends_E, every.counts_E)


def _expert_of_slot(got_re: Tensor, room: int) -> Tensor:
    """The local expert of every received slot, `[ep, C]`; e if the slot is empty."""
    places_rC = torch.arange(room, device=got_re.device).repeat(len(got_re), 1)
    return torch.searchsorted(got_re.cumsum(1), places_rC, right=True)
