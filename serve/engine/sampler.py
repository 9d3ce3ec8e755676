"""Samples the next token of every request from its logits.

The random number of a request's i-th token is a hash of its seed and i, looked up in the cumulative
distribution. So a seeded request gets the same tokens with any other requests in the batch, and
also after a retraction. The number has 24 bits, which fp32 represents exactly, so the product with
the total is below the total and never beyond the last likely token.

`top_k`, `top_p` and `min_p` all become one threshold per row: the probability of the last token
that is kept. Equally likely tokens are kept or removed together, and the threshold is a function of
the row alone, for any number of candidates that other rows require to be sorted.

Preparing a step (`Sampler.plan`) runs on the host and needs no result of the previous step; all
else runs on the device. Tokens above the tokenizer's (padded vocabulary) are removed first. R rows,
V vocabulary. Logits are fp32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve.engine.logprobs import Scores, score
from serve.engine.penalties import TokenHistory, penalize
from serve.engine.request import Request, TokenLogprob
from serve.engine.scheduler import Chunk
from serve.grammar.mask import apply_masks

_CANDIDATES = 256
"""Number of most likely tokens that a CPU sorts for `top_p` before it sorts all of them."""
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class _Params:
    """Tensors that stay the same while the same requests are sampled."""

    requests: list[Request]
    greedy: bool
    """Whether all rows are greedy."""
    temperature_R: Tensor
    drawn_R: Tensor
    """Rows that are not greedy."""
    limited: Tensor | None
    """Rows with top_k, top_p or min_p, and their values."""
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    bias: tuple[Tensor, Tensor, Tensor] | None
    """Rows, tokens, values."""
    penalized: list[int]
    penalties_3P: Tensor
    prompt_lens_P: Tensor
    scored: list[int]
    tops: list[int]


@dataclass(frozen=True)
class SamplingPlan:
    """One step of sampling, prepared by the host."""

    params: _Params
    draws: list[float]
    banned: tuple[list[int], list[int]]
    """Rows and tokens that `min_tokens` forbids."""
    masks: tuple[list[int], NDArray[np.int32]] | None
    """Rows with a grammar, and their bitmasks `[rows, words]`."""
    history_rows: list[int]
    history_ends: list[int]
    history_new: list[tuple[int, list[int]]]


@dataclass(frozen=True)
class Sampled:
    """Tokens of a step, on the device."""

    tokens_R: Tensor
    best_R: Tensor
    """The largest logit of each row; not finite if the model's logits are not usable."""
    scored: list[int]
    tops: list[int]
    scores: Scores | None

    def read(
        self, chunks: Sequence[Chunk]
    ) -> dict[Request, tuple[int | None, TokenLogprob | None]]:
        """Tokens and scores of the sampled requests, on the host; None: it has no token."""
        tokens, best = self.tokens_R.tolist(), self.best_R.tolist()
        logprobs: dict[int, TokenLogprob] = {}
        if self.scores is not None:
            found = self.scores.read([tokens[r] for r in self.scored], self.tops)
            logprobs = dict(zip(self.scored, found, strict=True))
        return {
            chunk.request: (tokens[r] if math.isfinite(best[r]) else None, logprobs.get(r))
            for r, chunk in enumerate(chunks)
        }


class Sampler:
    """Samples among the first `n_tokens` of the vocabulary.

    end_tokens: of the model. n_rows: maximum number of running requests.
    """

    def __init__(
        self, n_tokens: int, end_tokens: frozenset[int], n_rows: int, device: torch.device
    ) -> None:
        self.n_tokens = n_tokens
        self.end_tokens = end_tokens
        self.device = device
        self.history = TokenHistory(n_rows, device)
        self._params: _Params | None = None

    def plan(self, sampled: Sequence[Chunk]) -> SamplingPlan:
        """Prepare the sampling of a step on the host."""
        requests = [chunk.request for chunk in sampled]
        if self._params is None or self._params.requests != requests:
            self._params = self._pack(requests)
        params = self._params
        banned: tuple[list[int], list[int]] = ([], [])
        draws = []
        if not params.greedy:
            draws = [_uniform(chunk.request.seed, chunk.index) for chunk in sampled]
        for r, chunk in enumerate(sampled):
            ends = self._banned(chunk)
            if ends:
                banned[0].extend([r] * len(ends))
                banned[1].extend(ends)
        rows, ends_, new = [], [], []
        for r in params.penalized:
            chunk = sampled[r]
            rows.append(chunk.request.sequence.row)
            ends_.append(chunk.end)
            missing = self.history.missing(chunk.request, chunk.end)
            if missing is not None:
                new.append((rows[-1], missing))
        return SamplingPlan(params, draws, banned, _masks(requests), rows, ends_, new)

    def _banned(self, chunk: Chunk) -> frozenset[int]:
        """The end tokens and stop tokens that may not be sampled yet. After an end token a
        grammar does not continue, so with `ignore_eos` there is none while others are allowed."""
        own, grammar = chunk.request.params, chunk.request.grammar
        if chunk.index < own.min_tokens:
            ends = self.end_tokens.union(own.stop_token_ids)
        elif grammar is not None and own.ignore_eos:
            ends = self.end_tokens
        else:
            return frozenset()
        if grammar is not None and not grammar.allows_others(ends):
            return frozenset()
        return ends

    @torch.inference_mode()
    def sample(self, logits_RV: Tensor, plan: SamplingPlan) -> Sampled:
        """The next token of each row. Bias, penalties and masks change `logits_RV` in place."""
        params = plan.params
        unchanged_SV = logits_RV[self._tensor(params.scored)] if params.scored else None
        allowed_RV = logits_RV[:, : self.n_tokens]
        self._adjust(allowed_RV, plan)
        best_R, tokens_R = _largest(allowed_RV)
        if not params.greedy:
            tokens_R = torch.where(params.drawn_R, self._draw(allowed_RV, plan), tokens_R)
        if params.penalized:
            self.history.append(
                torch.tensor(plan.history_rows, device=self.device),
                torch.tensor(plan.history_ends, device=self.device),
                tokens_R[torch.tensor(params.penalized, device=self.device)],
                max(plan.history_ends),
            )
        scores = None
        if unchanged_SV is not None:
            tokens_S = tokens_R[self._tensor(params.scored)]
            scores = score(unchanged_SV, tokens_S, max(params.tops), self.n_tokens)
        return Sampled(tokens_R, best_R, params.scored, params.tops, scores)

    def _pack(self, requests: list[Request]) -> _Params:
        params = [request.params for request in requests]
        limited = [r for r, p in enumerate(params) if p.top_k > 0 or p.top_p < 1 or p.min_p > 0]
        limits = [params[r] for r in limited]
        biases = [(r, t, b) for r, p in enumerate(params) for t, b in p.logit_bias.items()]
        penalized = [r for r, p in enumerate(params) if p.has_penalties]
        scored = [r for r, p in enumerate(params) if p.logprobs is not None]
        vocab = self.n_tokens
        penalties = [
            [float(p.repetition_penalty), float(p.frequency_penalty), float(p.presence_penalty)]
            for p in (params[r] for r in penalized)
        ]
        return _Params(
            requests=requests,
            greedy=all(p.temperature == 0 for p in params),
            # below 1e-4 the division could overflow; the choice is greedy there anyway
            temperature_R=self._tensor([max(float(p.temperature), 1e-4) for p in params]),
            drawn_R=self._tensor([p.temperature > 0 for p in params]),
            limited=self._tensor(limited) if limited else None,
            top_k=self._tensor([min(p.top_k, vocab) if p.top_k > 0 else vocab for p in limits]),
            top_p=self._tensor([float(p.top_p) for p in limits]),
            min_p=self._tensor([float(p.min_p) for p in limits]),
            bias=(
                self._tensor([r for r, _, _ in biases]),
                self._tensor([t for _, t, _ in biases]),
                self._tensor([float(b) for _, _, b in biases]),
            )
            if biases
            else None,
            penalized=penalized,
            penalties_3P=self._tensor(penalties).view(-1, 3).T,
            prompt_lens_P=self._tensor([len(requests[r].prompt) for r in penalized]),
            scored=scored,
            tops=[params[r].logprobs or 0 for r in scored],
        )

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, device=self.device)

    def _adjust(self, logits_RV: Tensor, plan: SamplingPlan) -> None:
        """Apply masks, bias, penalties and `min_tokens` in place."""
        params, (rows, tokens) = plan.params, plan.banned
        if plan.masks is not None:
            apply_masks(logits_RV, *plan.masks)
        if params.bias is not None:
            logits_RV.index_put_(params.bias[:2], params.bias[2], accumulate=True)
        if params.penalized:
            for row, new in plan.history_new:
                self.history.write(row, new)
            at = torch.tensor(params.penalized, device=self.device)
            history = self.history.tokens[plan.history_rows, : max(plan.history_ends)]
            ends_P = torch.tensor(plan.history_ends, device=self.device)
            some_PV = logits_RV[at]
            penalize(some_PV, history, ends_P, params.prompt_lens_P, *params.penalties_3P)
            logits_RV[at] = some_PV
        if rows:
            logits_RV[rows, tokens] = -torch.inf

    def _draw(self, logits_RV: Tensor, plan: SamplingPlan) -> Tensor:
        params = plan.params
        logits_RV = logits_RV - logits_RV.max(-1, keepdim=True).values
        probs_RV = (logits_RV / params.temperature_R[:, None]).softmax(-1)
        if params.limited is not None:
            probs = probs_RV[params.limited]
            least = threshold(probs, params.top_k, params.top_p, params.min_p)
            probs_RV[params.limited] = probs.masked_fill(probs < least[:, None], 0.0)
        cumulative_RV = probs_RV.cumsum(-1)
        draws_R1 = torch.tensor(plan.draws, device=self.device)[:, None]
        found_R1 = torch.searchsorted(cumulative_RV, draws_R1 * cumulative_RV[:, -1:], right=True)
        return found_R1.squeeze(1).clamp(max=logits_RV.shape[1] - 1)


def _masks(requests: Sequence[Request]) -> tuple[list[int], NDArray[np.int32]] | None:
    """The masks of the requests that have a grammar."""
    masks = {
        r: request.grammar.mask
        for r, request in enumerate(requests)
        if request.grammar is not None and request.grammar.mask is not None
    }
    return (list(masks), np.stack(list(masks.values()))) if masks else None


def _largest(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row, and the first token that has it."""
    if logits_RV.device.type != "cpu" or not logits_RV.numel():
        return logits_RV.max(-1)
    # numpy searches with vector instructions, torch does not: 4 instead of 50 us per row of 32,000
    tokens_R = torch.from_numpy(logits_RV.numpy().argmax(-1))
    return logits_RV.gather(1, tokens_R[:, None]).squeeze(1), tokens_R


def threshold(probs_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor) -> Tensor:
    """`[R]`: the probability of the least likely token that is kept.

    `top_p` applies to the tokens that `top_k` kept; the most likely token is always kept.
    """
    vocab = probs_RV.shape[1]
    counts = top_k_R.where(top_k_R < vocab, 1)
    most = int(counts.max()) if probs_RV.device.type == "cpu" else vocab
    if (top_p_R < 1).any():
        most = max(most, _CANDIDATES)
    most = min(most, vocab)
    sorted_RK = probs_RV.topk(most, dim=-1).values
    least_R, enough_R = _nucleus(sorted_RK, top_k_R, top_p_R, vocab)
    if most < vocab and not bool(enough_R.all()):
        short = ~enough_R
        sorted_RV = probs_RV[short].sort(-1, descending=True).values
        least_R[short] = _nucleus(sorted_RV, top_k_R[short], top_p_R[short], vocab)[0]
    return torch.maximum(least_R, min_p_R * sorted_RK[:, 0])


def _nucleus(
    sorted_RK: Tensor, top_k_R: Tensor, top_p_R: Tensor, vocab: int
) -> tuple[Tensor, Tensor]:
    """The threshold of `top_k` and `top_p`, and whether there were enough candidates for it."""
    most = sorted_RK.shape[1]
    cumulative_RK = sorted_RK.cumsum(-1)
    has_k_R = top_k_R < vocab
    last_R1 = (top_k_R.clamp(max=most) - 1)[:, None]
    total_R = cumulative_RK.gather(1, last_R1).squeeze(1).where(has_k_R, 1.0)
    before_RK = cumulative_RK - sorted_RK
    stays_RK = (before_RK < (top_p_R * total_R)[:, None]) | (top_p_R >= 1)[:, None]
    stays_RK &= torch.arange(most, device=sorted_RK.device) < top_k_R[:, None]
    n_stay_R = stays_RK.sum(-1).clamp(min=1)
    enough_R = (n_stay_R < most) | (n_stay_R >= top_k_R) | (top_p_R >= 1)
    least_R = sorted_RK.gather(1, (n_stay_R - 1)[:, None]).squeeze(1)
    return least_R.where(has_k_R | (top_p_R < 1), 0.0), enough_R


def _uniform(seed: int, index: int) -> float:
    """A number in [0, 1) with 24 bits: SplitMix64 of both (doi:10.1145/2660193.2660195)."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 40) / (1 << 24)
