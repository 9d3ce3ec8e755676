"""Log-probabilities of the model, before any sampling parameter.

R rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.engine.request import TokenLogprob

LEAST_LOGPROB = -9999.0
"""Replaces minus infinity, which JSON cannot represent."""


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of some rows, on the device."""

    own_R: Tensor
    """That of each row's token."""
    top_values: Tensor
    top_ids: Tensor
    """The most likely tokens, best first; as many columns as the largest request."""

    def read(self, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
        """Convert to Python. tops: number of most likely tokens for each row."""
        own, values, ids = self.own_R.tolist(), self.top_values.tolist(), self.top_ids.tolist()
        return [
            TokenLogprob(token, own[r], list(zip(ids[r][:n], values[r][:n], strict=True)))
            for r, (token, n) in enumerate(zip(tokens, tops, strict=True))
        ]


def score(logits_RV: Tensor, tokens_R: Tensor, most: int, n_tokens: int) -> Scores:
    """Scores of `tokens_R` and of each row's `most` likely ones among the first `n_tokens`."""
    logprobs_RV = logits_RV.log_softmax(-1).clamp(min=LEAST_LOGPROB)
    own_R = logprobs_RV.gather(1, tokens_R[:, None]).squeeze(1)
    best = logprobs_RV[:, :n_tokens].topk(min(most, n_tokens), dim=-1)
    return Scores(own_R, best.values, best.indices)


def join(parts: Sequence[Scores]) -> Scores:
    """Concatenate the rows of several."""
    return Scores(
        *(torch.cat(each) for each in zip(*(vars(p).values() for p in parts), strict=True))
    )
