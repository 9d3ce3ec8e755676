"""From the chunks of a step to the tensors of its forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
    """int32 `[B]`: tokens of request b up to its last row, so the keys which that row may see."""
    page_tables: Tensor
    """int32 `[B, P]`: pages in order of position, padded with the null page. Where every layer has
    a window, pages behind it may be null too. Position p is at slot `page * page_size + offset`."""
    rows: Tensor
    """int64 `[R]`: the rows whose logits are wanted."""
    scored_rows: Tensor
    """int64 `[Q]`: the rows whose logits are wanted a few at a time; there may be thousands."""


def lay_out(
    chunks: Sequence[tuple[Sequence[int], int, Sequence[int]]], page_size: int, rows: Sequence[int]
) -> ForwardBatch:
    """The batch of chunks `(tokens, start, pages)`: tokens from position `start` on of a request
    that owns `pages`. rows: those whose logits are wanted."""
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
