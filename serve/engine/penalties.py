"""Penalties on earlier tokens, for all rows of a step at once.

The tokens of requests with penalties are stored on the device, a row per running request, and
sampled tokens are appended there; the host sends them once per admission. Only logits of tokens
that occur are changed: duplicates of a token compute the same value and write it several times.

P rows with penalties, L tokens of the longest, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from serve.engine.request import Request


class TokenHistory:
    """Tokens of running requests, by their row of the page table."""

    def __init__(self, n_rows: int, device: torch.device) -> None:
        self.tokens = torch.zeros(n_rows, 64, dtype=torch.int64, device=device)
        self._known: dict[int, tuple[Request, int]] = {}

    def missing(self, request: Request, n_tokens: int) -> list[int] | None:
        """Tokens that `write` must store before a step samples token `n_tokens`. None: nothing.

        Called on the host; the step is assumed to run, so its token need not be written.
        """
        row, known = request.sequence.row, (request, n_tokens)
        told = self._known.get(row) != known
        self._known[row] = (request, n_tokens + 1)
        return request.tokens[:n_tokens] if told else None

    def write(self, row: int, tokens: Sequence[int]) -> None:
        self._widen(len(tokens))
        self.tokens[row, : len(tokens)] = torch.tensor(tokens, device=self.tokens.device)

    def append(self, rows_P: Tensor, ends_P: Tensor, tokens_P: Tensor, longest: int) -> None:
        """Record that token `ends_P[p]` of row `rows_P[p]` was sampled."""
        self._widen(longest + 1)
        self.tokens[rows_P, ends_P] = tokens_P

    def _widen(self, n_tokens: int) -> None:
        missing = n_tokens - self.tokens.shape[1]
        if missing > 0:
            more = max(missing, self.tokens.shape[1])
            self.tokens = torch.nn.functional.pad(self.tokens, (0, more))


def penalize(
    logits_PV: Tensor,
    tokens_PL: Tensor,
    ends_P: Tensor,
    prompt_lens_P: Tensor,
    repetition_P: Tensor,
    frequency_P: Tensor,
    presence_P: Tensor,
) -> None:
    """Change `logits_PV` in place. tokens_PL: only the first `ends_P` are used."""
    positions_L = torch.arange(tokens_PL.shape[1], device=tokens_PL.device)
    inside_PL = positions_L < ends_P[:, None]
    # entries after the end are the first token, which is penalized anyway
    tokens_PL = tokens_PL.where(inside_PL, tokens_PL[:, :1])
    output_PL = (inside_PL & (positions_L >= prompt_lens_P[:, None])).to(logits_PV.dtype)
    counts_PL = torch.zeros_like(logits_PV).scatter_add_(1, tokens_PL, output_PL)
    counts_PL = counts_PL.gather(1, tokens_PL)
    values_PL = logits_PV.gather(1, tokens_PL)
    repetition_P1 = repetition_P[:, None]
    values_PL = torch.where(values_PL > 0, values_PL / repetition_P1, values_PL * repetition_P1)
    values_PL = values_PL - frequency_P[:, None] * counts_PL
    values_PL = values_PL - presence_P[:, None] * (counts_PL > 0)
    logits_PV.scatter_(1, tokens_PL, values_PL)
