"""One forward pass over the tokens of a step: the training network with a paged core.

The head is the largest matrix of a small model, so the final hidden states are reduced to the rows
whose logits are needed before the projection.

T tokens, R rows with logits, D model width, V vocabulary, L MoE layers, E experts, K of them per
token.
"""

import logging
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from configs.model import ModelConfig
from models.decoder import Decoder
from models.step_context import MicrobatchContext
from serve.cache.kv_cache import KvCache
from serve.engine.attention import PagedAttention
from serve.engine.batch import ForwardBatch, lay_out
from serve.engine.fused import FusedModel, build_fused

log = logging.getLogger("serve")

_ROWS = 8
"""Numbers of rows are multiples of this; see `kernels.grouped_gemm.grouped_gemm_cpu`."""
_SCORED_ROWS = 64
"""Number of rows whose logits are in memory at a time, if they are only scored."""

Score = Callable[[int, Tensor], None]
"""Called with the index of a first row in `scored_rows` and the fp32 logits `[n, V]` from there."""
Routing = Callable[[Tensor], None]
"""Called with the experts of every token, int64 `[L, T, K]`."""


class ExpertCounts:
    """How often every expert was chosen: int64 `[L, E]`, on the device of the model."""

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        n_layers = sum(model.is_moe(layer) for layer in range(model.n_layers))
        n_experts = model.moe.n_experts if n_layers else 0
        self.total_LE = torch.zeros(n_layers, n_experts, dtype=torch.int64, device=device)
        self._first = torch.arange(n_layers, device=device)[:, None, None] * n_experts

    def add(self, ids_LTK: Tensor, counted_T: Tensor | None = None) -> None:
        """Count the choices of a step; the host does not wait for them. counted_T: bool, false for
        rows that are padding."""
        if counted_T is None:
            ones = torch.ones_like(ids_LTK)
        else:
            ones = counted_T.long()[None, :, None].expand_as(ids_LTK)
        places = (ids_LTK + self._first).flatten()
        self.total_LE.view(-1).scatter_add_(0, places, ones.reshape(-1))


class ModelRunner:
    """The model and its cache."""

    def __init__(
        self,
        model: Decoder,
        cache: KvCache,
        absorbed: bool = False,
        fuses: bool = True,
        n_ranks: int = 1,
    ) -> None:
        """
        Args:
            model: The whole model, or this rank's part of it.
            cache: Keys and values of the heads that are here.
            absorbed: See `serve.engine.attention.PagedAttention`.
            fuses: Compute with `serve.engine.fused` if that yields the same bits.
            n_ranks: Ranks that compute a step together. The number of rows is a multiple of it.
        """
        self.model = model
        self.multiple = _ROWS * n_ranks
        self.cache = cache
        self.absorbed = absorbed
        self.counts = ExpertCounts(model.config, cache.device)
        self.fused = build_fused(model, cache) if fuses else None
        if self.fused is not None and not _agrees(self.fused, model):
            self.fused = None
        if self.fused is not None:
            self.fused.count_into(self.counts.total_LE)

    @torch.inference_mode()
    def run(
        self, batch: ForwardBatch, score: Score | None = None, routing: Routing | None = None
    ) -> Tensor:
        """fp32 logits `[R, V]` of `batch.rows`; keys and values are written to the cache.

        score: called with the logits of `batch.scored_rows`, a few at a time. routing: called with
        the chosen experts.
        """
        context = None
        if routing is not None:
            context = MicrobatchContext.recording(self.model.config)
        if self.fused is not None:
            x_TD = self.fused.hidden(batch, context)
            logits = partial(self.fused.logits, x_TD)
        else:
            logits = partial(self._logits, *self._hidden(batch, context))
        if routing is not None and context is not None:
            routing(self._all_tokens(context.routed_experts())[:, : len(batch.tokens)])
        if score is not None:
            for first in range(0, len(batch.scored_rows), _SCORED_ROWS):
                score(first, logits(batch.scored_rows[first : first + _SCORED_ROWS]))
        return logits(batch.rows)

    def _hidden(
        self, batch: ForwardBatch, context: MicrobatchContext | None
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states `[T, D]`, some rows more than tokens, and the head's weight."""
        device, context = self.cache.device, context or self._recording()
        hidden: tuple[Tensor, Tensor] = self.model(
            _padded(batch.tokens, self.multiple).to(device),
            _padded(batch.positions, self.multiple).to(device),
            PagedAttention(self.cache, batch, self.absorbed),
            output=lambda x_TD, weight_VD: (x_TD, weight_VD),
            context=context,
        )
        if context is not None:
            ids_LtK = context.routed_experts()
            first = self.model.tp_comm.place * ids_LtK.shape[1]  # this rank's share of the rows
            self.counts.add(ids_LtK[:, : max(0, len(batch.tokens) - first)])
        return hidden

    def _recording(self) -> MicrobatchContext | None:
        """A context that records the choice of experts; None if there are none."""
        has_experts = self.counts.total_LE.numel() > 0
        return MicrobatchContext.recording(self.model.config) if has_experts else None

    def expert_counts(self) -> NDArray[np.int64]:
        """int64 `[L, E]`: how often every expert was chosen since this runner was created."""
        return self.counts.total_LE.cpu().numpy().copy()

    def _logits(self, hidden_TD: Tensor, head_VD: Tensor, rows: Tensor) -> Tensor:
        """fp32 `[n, V]`. With tensor parallelism the head has a part of the vocabulary."""
        picked_TD = hidden_TD.index_select(0, _padded(rows, _ROWS).to(hidden_TD.device))
        logits_nv = F.linear(picked_TD, head_VD)[: len(rows)]
        if self.model.tp_comm.group is None or not len(rows):
            return logits_nv.float()
        return self.model.tp_comm.gather(logits_nv.T).T.float()

    def _all_tokens(self, ids_LtK: Tensor) -> Tensor:
        """The experts of all tokens, of which a rank of tensor parallelism routes its share."""
        return self.model.tp_comm.gather(ids_LtK.transpose(0, 1)).transpose(0, 1)


@torch.inference_mode()
def _agrees(fused: FusedModel, model: Decoder) -> bool:
    """Whether the logits of `fused` equal those of the torch form, bit by bit, on two requests
    whose last two tokens are computed one by one."""
    cache, size = fused.cache, fused.cache.page_size
    small = [KvCache(model.config, 5, size, cache.dtype, cache.device) for _ in range(2)]
    plain, length = ModelRunner(model, small[0], fuses=False), min(size, 64) + 11
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (2, length), generator=draw).tolist()
    fused.bind(small[1])
    difference = 0.0
    for first, last in ((0, length - 2), (length - 2, length - 1), (length - 1, length)):
        chunks = [(tokens[b][first:last], first, [2 * b + 1, 2 * b + 2]) for b in range(2)]
        batch = lay_out(chunks, size, range(2 * (last - first)))
        found = fused.logits(fused.hidden(batch), batch.rows)
        difference = max(difference, float((found - plain.run(batch)).abs().max()))
    fused.bind(cache)
    if difference:
        log.warning(
            "computed by torch's operations: kernels.fused_cpu has other bits than training on "
            "this machine (largest difference of logits %.1e)", difference,
        )  # fmt: skip
    return not difference


def _padded(values: Tensor, multiple: int) -> Tensor:
    """Repeat the last row, so that a token's padding uses no experts but its own."""
    return torch.cat([values, values[-1:].expand(-len(values) % multiple)])
