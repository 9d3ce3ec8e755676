"""Dispatch that the host never waits for: every rank sends every other a buffer of the same size.

Uneven all-to-alls need their splits on the host: one wait per layer, in which the device runs
dry, and which no CUDA graph can contain. Here a rank has room for C rows from each rank, C a fixed
multiple of the even share; what a buffer does not fill travels as filler. Group ends stay on the
device, where the grouped GEMM reads them.

A router may want more than C. Such rows do not travel, and their number is added up on the
device; `parallel.dispatch.overflow` reads it once per step, before anything has changed, and redoes
the step with `exact` set, or stops. So nothing is ever dropped unseen. (GShard, arXiv:2006.16668,
drops; a buffer for the worst case is the third choice: `capacity_factor` = ep ranks.)
Without gradients (validation) nobody could redo anything: there the exact exchange is used.

All ranks must bring the same number of tokens, since C follows from it.

T tokens, K experts per token, R = T * K rows, S = ep * C slots, E experts, e local experts.
"""

import math

import torch
from torch import Tensor

from kernels.moe.permute import Permutation, permutation
from parallel.dispatch.all_to_all import AllToAll, DirectPlan
from parallel.dispatch.packed_rows import RowAllToAll
from parallel.dispatch.plan import DispatchPlan


class SyncFree:
    """`Planner` with buffers of fixed size."""

    def __init__(
        self, n_experts: int, link: RowAllToAll, capacity_factor: float, align: int = 1
    ) -> None:
        self.n_experts, self.link, self.traffic = n_experts, link, link.traffic
        self.capacity_factor, self.align = capacity_factor, align
        self.uneven = AllToAll(n_experts, link, align)
        self.exact = False
        """Use the exact exchange, which waits for the device."""

    def capacity(self, n_rows: int, top_k: int) -> int:
        """Rows that one rank may send another, of `n_rows` it has."""
        even = n_rows / self.link.size
        most = n_rows // top_k * min(top_k, self.n_experts // self.link.size)
        return min(math.ceil(self.capacity_factor * even), most)

    def plan(self, ids: list[Tensor]) -> list[DispatchPlan]:
        if self.exact or not torch.is_grad_enabled():
            return self.uneven.plan(ids)
        return [self._plan(ids_TK) for ids_TK in ids]

    def _plan(self, ids_TK: Tensor) -> DispatchPlan:
        ep, top_k = self.link.size, ids_TK.shape[1]
        room = self.capacity(ids_TK.numel(), top_k)
        every = permutation(ids_TK, self.n_experts)
        wanted_re = every.counts_E.view(ep, -1)
        kept_re = _first(wanted_re, room)
        got_re = self.link.exchange_counts(kept_re)
        self._account(wanted_re, kept_re, got_re, room)
        to = _into_buffers(every, wanted_re.sum(1), room)
        by_expert = permutation(_expert_of_slot(got_re, room), got_re.shape[1], self.align)
        return DirectPlan(self.link, to, by_expert, None, None, top_k)

    def _account(self, wanted_re: Tensor, kept_re: Tensor, got_re: Tensor, room: int) -> None:
        traffic, own = self.traffic, kept_re[self.link.group.rank()]
        traffic.on_device(wanted_re)
        traffic.lost += (wanted_re - kept_re).sum()
        traffic.rows_sent += kept_re.sum() - own.sum()
        traffic.rows_received += got_re.sum()
        traffic.fullest = wanted_re.sum(1).max().clamp(min=traffic.fullest)
        traffic.capacity = room


def _first(counts_re: Tensor, room: int) -> Tensor:
    """What of each rank's experts' rows, in this order, finds room."""
    ends_re = counts_re.cumsum(1).clamp(max=room)
    return ends_re.diff(dim=1, prepend=ends_re.new_zeros(len(ends_re), 1))


def _into_buffers(every: Permutation, wanted_r: Tensor, room: int) -> Permutation:
    """From rows packed by expert to rows in one buffer of `room` slots per rank.

    What fills no buffer travels as zeros and is not read.
    """
    n_slots = room * len(wanted_r)
    row_R = torch.arange(len(every.order_P), device=wanted_r.device)
    ends_r = wanted_r.cumsum(0)
    rank_R = torch.searchsorted(ends_r, row_R, right=True)
    place_R = row_R - (ends_r - wanted_r)[rank_R]
    fits_R = place_R < room
    slot_R = torch.where(fits_R, rank_R * room + place_R, n_slots)
    order_P = every.order_P.new_full((n_slots + 1,), -1)  # the last takes what does not fit
    order_P[slot_R] = every.order_P
    inverse_R = torch.empty_like(slot_R)
    inverse_R[every.order_P] = torch.where(fits_R, slot_R, -1)
    return Permutation(order_P[:-1], inverse_R, every.ends_E, every.counts_E)


def _expert_of_slot(got_re: Tensor, room: int) -> Tensor:
    """The local expert of every received slot, `[ep, C]`; e where the slot holds nothing."""
    places_rC = torch.arange(room, device=got_re.device).repeat(len(got_re), 1)
    return torch.searchsorted(got_re.cumsum(1), places_rC, right=True)
