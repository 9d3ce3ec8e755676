"""Creates the tensors of a forward pass from the chunks of a step.

The model runner does not access requests or queues: its only input is a `ForwardBatch`. A decode of
any length needs only a few numbers here: its pages are a row of the page table, which the page
manager keeps from step to step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from serve.cache.allocator import NULL_PAGE
from serve.cache.manager import PageManager
from serve.engine.request import Request
from serve.engine.scheduler import Chunk

_NO_ROWS = torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class ForwardBatch:
    """Host tensors: T tokens of B requests, P pages of the longest one."""

    tokens: Tensor
    """int64 `[T]`, requests one after another, those with one token first."""
    positions: Tensor
    """int64 `[T]`, of each token in its request."""
    query_starts: Tensor
    """int32 `[B + 1]`: rows `query_starts[b]` to `query_starts[b + 1]` belong to request b."""
    key_lengths: Tensor
    """int32 `[B]`: tokens of request b up to its last row, which are the keys of that row."""
    page_tables: Tensor
    """int32 `[B, P]`: pages in order of position, padded with the null page. If every layer has
    a window, pages before it may be null too. Position p is at slot `page * page_size + offset`."""
    rows: Tensor
    """int64 `[R]`: the rows whose logits are computed."""
    scored_rows: Tensor
    """int64 `[Q]`: the rows whose logits are computed a few at a time; there may be thousands."""

    def slots(self, page_size: int) -> Tensor:
        """int64 `[T]`: the slots of the keys and values of each row."""
        lengths = self.query_starts.diff()
        sequences = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        pages = self.page_tables[sequences, self.positions // page_size].long()
        return pages * page_size + self.positions % page_size


@dataclass(frozen=True)
class ScoredRow:
    """The row of a prompt token whose successor is scored."""

    request: Request
    token: int
    """The successor."""
    top: int
    """Number of most likely tokens to report in addition."""


@dataclass(frozen=True)
class StepPlan:
    """A step that is ready to be computed."""

    chunks: list[Chunk]
    batch: ForwardBatch
    sampled: list[Chunk]
    """The chunks of `batch.rows`."""
    scored: list[ScoredRow]
    """The tokens scored by `batch.scored_rows`."""
    unknown: list[tuple[int, int]]
    """Rows whose token the previous step has yet to sample, each with its index in the `sampled` of
    that step."""


def plan_step(
    chunks: list[Chunk], pages: PageManager, before: Mapping[Request, int] | None = None
) -> StepPlan:
    """Plan a step. before: indices of requests among the sampled ones of the running step."""
    tokens: list[int] = []
    rows: list[int] = []
    sampled: list[Chunk] = []
    scored_rows: list[int] = []
    scored: list[ScoredRow] = []
    unknown: list[tuple[int, int]] = []
    for chunk in chunks:
        request, first = chunk.request, len(tokens)
        if request.params.scored_prompt is not None:
            _score_prompt(chunk, first, scored_rows, scored)
        if chunk.end > len(request.tokens):
            assert before is not None and chunk.length == 1
            unknown.append((first, before[request]))
            tokens.append(0)
        elif chunk.length == 1:
            tokens.append(request.tokens[chunk.start])
        else:
            tokens += request.tokens[chunk.start : chunk.end]
        if chunk.samples:
            rows.append(len(tokens) - 1)
            sampled.append(chunk)
    batch = _layout(chunks, pages, tokens, rows, scored_rows)
    return StepPlan(chunks, batch, sampled, scored, unknown)


def _score_prompt(
    chunk: Chunk, first: int, scored_rows: list[int], scored: list[ScoredRow]
) -> None:
    """Add the rows of `chunk` that score the prompt, but none twice after a retraction."""
    request = chunk.request
    top = request.params.scored_prompt
    assert top is not None
    begin = max(chunk.start, len(request.prompt_logprobs))
    for position in range(begin, min(chunk.end, len(request.prompt) - 1)):
        scored_rows.append(first + position - chunk.start)
        scored.append(ScoredRow(request, request.prompt[position + 1], top))


def _layout(
    chunks: Sequence[Chunk],
    pages: PageManager,
    tokens: list[int],
    rows: list[int],
    scored_rows: list[int],
) -> ForwardBatch:
    positions: list[int] = []
    query_starts, ends = [0], []
    for chunk in chunks:
        positions += range(chunk.start, chunk.end)
        query_starts.append(len(positions))
        ends.append(chunk.end)
    held = [pages.pages_for(end) for end in ends]
    table = pages.page_table[:, : max(held)].take([c.request.sequence.row for c in chunks], axis=0)
    if len(chunks) > 1:  # pages beyond are allocated for later steps, or of earlier requests
        table[np.arange(table.shape[1]) >= np.array(held)[:, None]] = NULL_PAGE
    # few operations: their code is not in the processor's cache after a step
    return ForwardBatch(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        query_starts=torch.tensor(query_starts, dtype=torch.int32),
        key_lengths=torch.tensor(ends, dtype=torch.int32),
        page_tables=torch.from_numpy(table),
        rows=torch.tensor(rows, dtype=torch.int64),
        scored_rows=torch.tensor(scored_rows, dtype=torch.int64) if scored_rows else _NO_ROWS,
    )


def lay_out(
    chunks: Sequence[tuple[Sequence[int], int, Sequence[int]]], page_size: int, rows: Sequence[int]
) -> ForwardBatch:
    """The batch of chunks `(tokens, start, pages)`: tokens from position `start` on of a request
    that owns `pages`. rows: those whose logits are computed."""
    ends = [start + len(tokens) for tokens, start, _ in chunks]
    starts = [0]
    for tokens, _, _ in chunks:
        starts.append(starts[-1] + len(tokens))
    width = max(-(-end // page_size) for end in ends)
    table = torch.zeros(len(chunks), width, dtype=torch.int32)
    for b, ((_, _, pages), end) in enumerate(zip(chunks, ends, strict=True)):
        used = pages[: -(-end // page_size)]
        table[b, : len(used)] = torch.tensor(used, dtype=torch.int32)
    return ForwardBatch(
        tokens=torch.tensor([token for tokens, _, _ in chunks for token in tokens]),
        positions=torch.cat(
            [torch.arange(start, end) for (_, start, _), end in zip(chunks, ends, strict=True)]
        ),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        key_lengths=torch.tensor(ends, dtype=torch.int32),
        page_tables=table,
        rows=torch.tensor(rows, dtype=torch.int64),
        scored_rows=torch.zeros(0, dtype=torch.int64),
    )
