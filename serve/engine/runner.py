"""One forward pass over the chunks of a step: the training network with a paged core.

The head is the largest matrix of a small model, so the final hidden states are cut to the rows
whose logits somebody reads before they meet it. T tokens, R rows that are read, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoder import Decoder
from serve.cache.kv_cache import KvCache
from serve.engine.attention import PagedAttention
from serve.engine.request import Request
from serve.engine.scheduler import Chunk


@dataclass(frozen=True)
class Row:
    """Whose logits a row holds: those of the token after `position`."""

    request: Request
    position: int

    @property
    def samples(self) -> bool:
        """The next token is not known yet."""
        return self.position + 1 == len(self.request.tokens)


def wanted_rows(chunk: Chunk) -> list[Row]:
    """The rows of a chunk that are read: those that score the prompt, and the newest token's."""
    request = chunk.request
    positions: list[int] = []
    if request.params.scores_prompt:  # not twice, when the request was preempted
        begin = max(chunk.start, len(request.prompt_logprobs))
        positions += range(begin, min(chunk.end, len(request.prompt) - 1))
    if chunk.samples:
        positions.append(chunk.end - 1)
    return [Row(request, position) for position in positions]


class ModelRunner:
    """The model and its cache."""

    def __init__(self, model: Decoder, cache: KvCache) -> None:
        self.model = model
        self.cache = cache

    @torch.inference_mode()
    def run(self, batch: Sequence[Chunk]) -> tuple[Tensor, list[Row]]:
        """fp32 logits `[R, V]` and what each row is; keys and values enter the cache."""
        tokens: list[int] = []
        positions: list[int] = []
        rows: list[Row] = []
        wanted: list[int] = []
        for chunk in batch:
            tokens += chunk.request.tokens[chunk.start : chunk.end]
            positions += range(chunk.start, chunk.end)
            for row in wanted_rows(chunk):
                rows.append(row)
                wanted.append(len(positions) - chunk.end + row.position)
        device = self.cache.pool.device
        wanted_R = torch.tensor(wanted, dtype=torch.long, device=device)
        logits_RV: Tensor = self.model(
            torch.tensor(tokens, device=device),
            torch.tensor(positions, device=device),
            PagedAttention(self.cache, batch),
            output=lambda x_TD, head_VD: F.linear(x_TD.index_select(0, wanted_R), head_VD),
        )
        return logits_RV.float(), rows
