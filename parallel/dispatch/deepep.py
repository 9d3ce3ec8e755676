"""Adapter to DeepEP (https://github.com/deepseek-ai/DeepEP, version 2), if it is installed.

Its `dispatch` sends a token once to every rank that holds one of its experts (over NVLink and RDMA,
without NCCL) and returns the chosen experts of that rank; its `combine` sums the results. Each is
the transpose of the other, as a plan requires; this module only copies a token's row for each of
its experts on this rank, and sums these. Only bf16 is supported; the host waits for the counts.

Written for the public API of 2.0 (`ElasticBuffer`); tested with a replacement that implements the
same calls over gloo, never on the hardware that DeepEP requires.

T tokens, U tokens received by this rank, K experts per token, P slots, D width, e local experts.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from configs.errors import ConfigError
from kernels.moe.permute import Permutation, combine_rows, permutation
from models.step_context import DispatchStats
from parallel.dispatch.packed_rows import (
    PackedRows,
    WireFormat,
    per_choice,
    to_choices,
)
from parallel.dispatch.plan import CombinedRows, DispatchPlan


def elastic_buffer() -> Any:
    """The class of DeepEP's buffers. Raises ConfigError if DeepEP is missing."""
    try:
        import deep_ep  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ConfigError(
            f'parallel.dispatch.kind = "deepep": DeepEP is not installed here ({error}); '
            'install it from github.com/deepseek-ai/DeepEP, or use "all_to_all"'
        ) from None
    if not hasattr(deep_ep, "ElasticBuffer"):
        raise ConfigError(
            'parallel.dispatch.kind = "deepep": needs DeepEP 2 (deep_ep.ElasticBuffer); '
            "this one is older"
        )
    return deep_ep.ElasticBuffer


class DeepEP:
    """`Planner` that uses DeepEP for communication; all layers share one buffer."""

    def __init__(
        self, n_experts: int, group: dist.ProcessGroup, buffers: dict[str, Any], align: int = 1
    ) -> None:
        self.n_experts, self.group, self.buffers, self.align = n_experts, group, buffers, align
        self.make = elastic_buffer()

    def plan(
        self, ids: list[Tensor], stats: DispatchStats, exact: bool = False
    ) -> list[DispatchPlan]:
        return [DeepEPPlan(self, stats, ids_TK) for ids_TK in ids]

    def buffer(self, n_tokens: int, width: int, top_k: int) -> Any:
        """The shared buffer, recreated if a batch is larger than all earlier ones."""
        needed = self.make.get_buffer_size_hint(self.group, n_tokens, width, num_topk=top_k)
        found = self.buffers.get("elastic")
        if found is None or found.num_bytes < needed:
            found = self.make(
                self.group, num_max_tokens_per_rank=n_tokens, hidden=width, num_topk=top_k
            )
            self.buffers["elastic"] = found
        return found


class PendingDispatch(NamedTuple):
    """Result of DeepEP's `dispatch`; ids and weights if they were sent."""

    data_UD: Tensor
    ids_UK: Tensor | None
    weights_UK: Tensor | None
    event: Any


class PendingCombine(NamedTuple):
    """Result of DeepEP's `combine`."""

    y_TD: Tensor
    weights_TK: Tensor | None
    event: Any


@dataclass
class DeepEPPlan:
    """DeepEP's exchange, then a row for each of a token's local experts; and the transpose."""

    planner: DeepEP
    stats: DispatchStats
    ids_TK: Tensor
    handle: Any = None
    """DeepEP's handle, from its first dispatch."""
    here: Permutation | None = None
    """Permutation from the U local tokens to the rows of experts; set when they have arrived."""

    def start_dispatch(
        self, x_TD: Tensor, weights_TK: Tensor | None, wire: WireFormat
    ) -> PendingDispatch:
        assert wire == "compute", "refused by the schema"
        if x_TD.dtype != torch.bfloat16:
            raise ValueError(
                f'parallel.dispatch.kind = "deepep": sends bf16 only, not {x_TD.dtype}'
            )
        (n_tokens, width), top_k = x_TD.shape, self.ids_TK.shape[1]
        buffer = self.planner.buffer(n_tokens, width, top_k)
        how = {"async_with_compute_stream": True}
        if weights_TK is None:
            data_UD, *_, event = buffer.dispatch(x_TD, handle=self.handle, **how)
            return PendingDispatch(data_UD, None, None, event)
        data_UD, ids_UK, weights_UK, self.handle, event = buffer.dispatch(
            x_TD, topk_idx=self.ids_TK, topk_weights=weights_TK,
            num_experts=self.planner.n_experts, **how,
        )  # fmt: skip
        return PendingDispatch(data_UD, ids_UK, weights_UK, event)

    def finish_dispatch(self, handle: PendingDispatch) -> PackedRows:
        handle.event.current_stream_wait()
        if handle.ids_UK is not None:
            self._arrange(handle.ids_UK)
        assert self.here is not None
        extra = per_choice(handle.weights_UK, self.here)
        return PackedRows(handle.data_UD, None, None).gathered(self.here, extra)

    def start_combine(
        self, rows_PD: Tensor, weights_P: Tensor | None, wire: WireFormat
    ) -> PendingCombine:
        assert wire == "compute" and self.here is not None
        top_k = self.ids_TK.shape[1]
        tokens_UD = combine_rows(rows_PD, self.here, top_k)
        weights_UK = to_choices(weights_P, self.here, top_k)
        buffer = self.planner.buffers["elastic"]
        return PendingCombine(*buffer.combine(
            tokens_UD, handle=self.handle, topk_weights=weights_UK, async_with_compute_stream=True
        ))  # fmt: skip

    def finish_combine(self, handle: PendingCombine, dtype: torch.dtype) -> CombinedRows:
        handle.event.current_stream_wait()
        return CombinedRows(handle.y_TD, handle.weights_TK)

    def _arrange(self, ids_UK: Tensor) -> None:
        """Order the rows by expert. ids_UK: experts of this rank; -1 for those of other ranks."""
        n_local = self.planner.n_experts // dist.get_world_size(self.planner.group)
        n_rows = sum(self.handle.num_recv_tokens_per_expert_list)
        named_UK = torch.where(ids_UK < 0, n_local, ids_UK).long()
        self.here = permutation(named_UK, n_local, self.planner.align, n_rows)
        self.ends_e, self.counts_e = self.here.ends_E, self.here.counts_E
        stats, me = self.stats, dist.get_rank(self.planner.group)
        stats.on_device(self.ids_TK)
        stats.rows_received += n_rows
        stats.rows_sent += (self.ids_TK // n_local != me).sum()
