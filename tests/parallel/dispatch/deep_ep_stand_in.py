"""Replacement for DeepEP's calls, as in its public documentation, over gloo; for the test of our
adapter.

Rows are sent once to every rank that has one of a token's experts; received rows identify experts
by their index on that rank, or -1. Slow and simple.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Event:
    """The end of an exchange; here it has already ended, but callers must wait for it all the
    same."""

    def __init__(self, *tensors: Tensor | None) -> None:
        self.hidden = [(t, t.clone()) for t in tensors if t is not None]
        for tensor, _ in self.hidden:  # read only by callers that do not wait
            tensor.fill_(77)

    def current_stream_wait(self) -> None:
        for tensor, true in self.hidden:
            tensor.copy_(true)


@dataclass
class Handle:
    """Data of a dispatch that its combine needs."""

    sources: list[list[int]]
    """Tokens of this rank that were sent to every rank."""
    received: list[int]
    num_recv_tokens_per_expert_list: list[int]


class ElasticBuffer:
    def __init__(
        self, group: dist.ProcessGroup, num_max_tokens_per_rank: int, hidden: int, num_topk: int
    ) -> None:
        self.group, self.room = group, num_max_tokens_per_rank
        self.num_bytes = self.get_buffer_size_hint(group, num_max_tokens_per_rank, hidden, num_topk)

    @staticmethod
    def get_buffer_size_hint(
        group: dist.ProcessGroup, num_max_tokens_per_rank: int, hidden: int, num_topk: int = 0
    ) -> int:
        return num_max_tokens_per_rank * (2 * hidden + 12 * num_topk) * dist.get_world_size(group)

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_experts: int | None = None,
        handle: Handle | None = None,
        async_with_compute_stream: bool = False,
    ) -> tuple[Any, ...]:
        assert x.dtype == torch.bfloat16 and len(x) <= self.room and async_with_compute_stream
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            data = self._send(x, handle)
            return data, None, None, handle, Event(data)
        assert topk_idx is not None and topk_weights is not None and num_experts is not None
        assert topk_weights.dtype == torch.float32
        ranks, me = dist.get_world_size(self.group), dist.get_rank(self.group)
        local = num_experts // ranks
        owner = topk_idx // local
        sources = [
            [t for t in range(len(x)) if bool((owner[t] == rank).any())] for rank in range(ranks)
        ]
        received = torch.zeros(ranks, dtype=torch.int64)
        dist.all_to_all_single(received, torch.tensor([len(s) for s in sources]), group=self.group)
        handle = Handle(sources, received.tolist(), [])
        ids, weights = self._send(topk_idx, handle), self._send(topk_weights, handle)
        ids = torch.where(ids // local == me, ids % local, -1)
        handle.num_recv_tokens_per_expert_list = [int((ids == e).sum()) for e in range(local)]
        data = self._send(x, handle)
        return data, ids, weights, handle, Event(data, weights)

    def combine(
        self,
        x: Tensor,
        handle: Handle,
        topk_weights: Tensor | None = None,
        async_with_compute_stream: bool = False,
    ) -> tuple[Any, ...]:
        assert x.dtype == torch.bfloat16 and async_with_compute_stream
        n_tokens = max((t for source in handle.sources for t in source), default=-1) + 1
        y = self._back(x, handle, n_tokens)
        weights = None if topk_weights is None else self._back(topk_weights, handle, n_tokens)
        return y, weights, Event(y, weights)

    def _send(self, rows: Tensor, handle: Handle) -> Tensor:
        out = rows.new_empty(sum(handle.received), rows.shape[1])
        order = torch.tensor([t for source in handle.sources for t in source], dtype=torch.int64)
        dist.all_to_all_single(
            out, rows[order], handle.received, [len(s) for s in handle.sources], group=self.group
        )
        return out

    def _back(self, rows: Tensor, handle: Handle, n_tokens: int) -> Tensor:
        sizes = [len(source) for source in handle.sources]
        out = rows.new_empty(sum(sizes), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), sizes, handle.received, group=self.group)
        total = torch.zeros(n_tokens, rows.shape[1])
        order = torch.tensor([t for source in handle.sources for t in source], dtype=torch.int64)
        return total.index_add_(0, order, out.float()).to(rows.dtype)
