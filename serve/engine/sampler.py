"""From logits to the next token of every request.

A request draws one number per token from a generator of its own and looks it up in the cumulative
distribution, so a seeded request gets the same tokens whatever else is in the batch, and a
preempted one goes on undisturbed. The number has 24 bits: fp32 holds it exactly, so scaled by the
total it stays below it and never falls behind the last likely token.

Only rows that limit `top_k` or `top_p` pay for a sort. Logits are fp32. R rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from serve.engine.request import Request, SamplingParams, TokenLogprob

_LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot spell."""


@torch.inference_mode()
def choose(logits_RV: Tensor, requests: Sequence[Request]) -> list[int | None]:
    """The next token of each row's request; None where the model gave no finite logits."""
    best_R, tokens_R = logits_RV.max(-1)
    drawn = [r for r, request in enumerate(requests) if request.params.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits_RV.device)
        tokens_R[rows] = _draw(logits_RV[rows], [requests[r] for r in drawn])
    finite = best_R.isfinite().tolist()
    return [token if fine else None for token, fine in zip(tokens_R.tolist(), finite, strict=True)]


def _draw(logits_RV: Tensor, requests: Sequence[Request]) -> Tensor:
    device = logits_RV.device
    params = [request.params for request in requests]
    temperatures = torch.tensor([p.temperature for p in params], device=device)
    # below 1e-4 the division could overflow; the choice is greedy there anyhow
    logits_RV = logits_RV - logits_RV.max(-1, keepdim=True).values
    probs_RV = (logits_RV / temperatures.clamp(min=1e-4)[:, None]).softmax(-1)
    limited = [r for r, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    if limited:
        rows = torch.tensor(limited, device=device)
        probs_RV[rows] = _limit(probs_RV[rows], [params[r] for r in limited])
    cumulative_RV = probs_RV.cumsum(-1)
    draws = [request.rng.getrandbits(24) / 2**24 for request in requests]
    targets_R1 = torch.tensor(draws, device=device)[:, None] * cumulative_RV[:, -1:]
    found_R1 = torch.searchsorted(cumulative_RV, targets_R1, right=True)
    return found_R1.squeeze(1).clamp(max=logits_RV.shape[1] - 1)


def _limit(probs_RV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Set what `top_k` and then `top_p` exclude to zero; the most likely token always stays."""
    device, vocab = probs_RV.device, probs_RV.shape[1]
    top_k = [min(p.top_k, vocab) if p.top_k > 0 else vocab for p in params]
    top_k_R1 = torch.tensor(top_k, device=device)[:, None]
    top_p_R1 = torch.tensor([p.top_p for p in params], device=device)[:, None]
    sorted_RV, order_RV = probs_RV.sort(stable=True, dim=-1, descending=True)
    sorted_RV = sorted_RV.masked_fill(torch.arange(vocab, device=device) >= top_k_R1, 0.0)
    total_R1 = sorted_RV.sum(-1, keepdim=True)
    before_RV = sorted_RV.cumsum(-1) - sorted_RV
    before_RV[:, 0] = 0.0
    beyond_RV = (before_RV >= top_p_R1 * total_R1) & (top_p_R1 < 1)
    beyond_RV[:, 0] = False
    return torch.zeros_like(probs_RV).scatter_(1, order_RV, sorted_RV.masked_fill(beyond_RV, 0.0))


@torch.inference_mode()
def score(logits_RV: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    """Log-probability of each row's token and of its `tops[r]` most likely ones."""
    logprobs_RV = logits_RV.log_softmax(-1).clamp(min=_LEAST_LOGPROB)
    chosen_R1 = torch.tensor(tokens, device=logits_RV.device)[:, None]
    own = logprobs_RV.gather(1, chosen_R1).squeeze(1).tolist()
    best = logprobs_RV.topk(min(max(tops), logits_RV.shape[1]), dim=-1)
    values, ids = best.values.tolist(), best.indices.tolist()
    return [
        TokenLogprob(token, own[r], list(zip(ids[r][:n], values[r][:n], strict=True)))
        for r, (token, n) in enumerate(zip(tokens, tops, strict=True))
    ]
