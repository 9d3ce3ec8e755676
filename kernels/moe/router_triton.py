"""Triton forms of `kernels.moe.router`: one launch forward, one backward.

A warp processes a token and holds all its scores, as groups x experts of a group, so that the best
of a group and of all are reductions within the warp: no shared memory, no barrier. The k-th best is
the maximum of the remaining scores, then the lowest index with it. A warp processes a few tokens
one after another and adds up their choices before it adds them to the global counts, so that tokens
that all choose the same expert do not serialize on one address.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 4
"""Tokens per program, if there are enough for all programs."""
_ENOUGH = 4096
"""Number of tokens up to which there is a program per token."""


def route(
    logits_TE: Tensor, bias_E: Tensor, given_TK: Tensor | None, top_k: int, softmax: bool,
    n_groups: int, top_groups: int, normalize: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Ids, weights and counts; the arguments after the tensors are those of `RouterOptions`."""
    logits_TE = logits_TE.contiguous()
    n_tokens, n_experts = logits_TE.shape
    ids_TK = logits_TE.new_empty(n_tokens, top_k, dtype=torch.int64)
    if given_TK is not None:
        ids_TK.copy_(given_TK)
    weights_TK = logits_TE.new_empty(n_tokens, top_k)
    counts_E = logits_TE.new_zeros(n_experts, dtype=torch.int64)
    if n_tokens:
        per_program = min(_TOKENS, triton.cdiv(n_tokens, _ENOUGH))
        _forward[(triton.cdiv(n_tokens, per_program),)](
            logits_TE, bias_E, ids_TK, weights_TK, counts_E, n_tokens, per_program,
            n_experts, n_groups, scale, SOFTMAX=softmax, NORMALISE=normalize,
            GIVEN=given_TK is not None, TOP_GROUPS=top_groups if top_groups < n_groups else 0,
            **_tile(n_experts, top_k, n_groups),
        )  # fmt: skip
    return ids_TK, weights_TK, counts_E


def backward(
    grad_TK: Tensor, logits_TE: Tensor, ids_TK: Tensor, softmax: bool, normalize: bool, scale: float
) -> Tensor:
    """`kernels.moe.router.route_backward_reference` in one launch."""
    logits_TE = logits_TE.contiguous()
    (n_tokens, n_experts), top_k = logits_TE.shape, ids_TK.shape[1]
    grad_TE = torch.empty_like(logits_TE)
    if n_tokens:
        tile = _tile(n_experts, top_k, 1)
        _backward[(n_tokens,)](
            grad_TK.contiguous(), logits_TE, ids_TK.contiguous(), grad_TE, n_experts, scale,
            SOFTMAX=softmax, NORMALISE=normalize, TOP_K=top_k, K=tile["K"],
            E=tile["S"], num_warps=tile["num_warps"],
        )  # fmt: skip
    return grad_TE


def _tile(n_experts: int, top_k: int, n_groups: int) -> dict[str, int]:
    size = n_experts // n_groups
    groups, places = triton.next_power_of_2(n_groups), triton.next_power_of_2(size)
    return {
        "TOP_K": top_k, "K": triton.next_power_of_2(top_k), "SIZE": size, "G": groups, "S": places,
        "num_warps": 1 if groups * places <= 1024 else 4,
    }  # fmt: skip


@triton.jit
def _normalized(score, scale, NORMALISE: tl.constexpr):  # type: ignore[no-untyped-def]
    if NORMALISE:
        score = score / (tl.sum(score, 0) + 1e-20)
    return score * scale


@triton.jit
def _best_groups(  # type: ignore[no-untyped-def]
    value, n_groups, SOFTMAX: tl.constexpr, TOP_GROUPS: tl.constexpr, SIZE: tl.constexpr,
    G: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """`value`, minus infinity outside the best groups."""
    group = tl.arange(0, G)
    best = tl.max(value, 1)
    if not SOFTMAX and SIZE > 1:
        place = tl.arange(0, S)[None, :]
        first = tl.min(tl.where(value == best[:, None], place, S), 1)
        best += tl.max(tl.where(place == first[:, None], float("-inf"), value), 1)
    best = tl.where(group < n_groups, best, float("-inf"))
    kept = tl.zeros((G,), tl.int32)
    for _ in range(TOP_GROUPS):
        chosen = group == tl.min(tl.where(best == tl.max(best, 0), group, G), 0)
        kept = tl.where(chosen, 1, kept)
        best = tl.where(chosen, float("-inf"), best)
    return tl.where((kept == 1)[:, None], value, float("-inf"))


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, counts_ptr, n_tokens, per_program, n_experts,
    n_groups, scale,
    SOFTMAX: tl.constexpr, NORMALISE: tl.constexpr, GIVEN: tl.constexpr, TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, G: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    groups, places, choices = tl.arange(0, G)[:, None], tl.arange(0, S)[None, :], tl.arange(0, K)
    inside = (groups < n_groups) & (places < SIZE)
    expert = tl.where(inside, groups * SIZE + places, -1)
    count = tl.zeros((G, S), tl.int32)
    first = tl.program_id(0).to(tl.int64) * per_program
    for token in range(first, tl.minimum(first + per_program, n_tokens)):
        row = logits_ptr + token * n_experts
        x = tl.load(row + expert, mask=inside, other=float("-inf"))
        if SOFTMAX:
            largest = tl.max(tl.max(x, 1), 0)
            x = tl.exp(x - largest)
            total = tl.sum(tl.sum(x, 1), 0)
            x = x / total
        else:
            x = tl.sigmoid(x)
        at = ids_ptr + token * TOP_K + choices
        if GIVEN:
            chosen = tl.load(at, mask=choices < TOP_K, other=0)
            for k in range(TOP_K):
                one = tl.load(ids_ptr + token * TOP_K + k)
                count += (expert == one).to(tl.int32)
        else:
            bias = tl.load(bias_ptr + expert, mask=inside, other=0.0)
            value = tl.where(inside, x + bias, float("-inf"))
            if TOP_GROUPS > 0:
                value = _best_groups(value, n_groups, SOFTMAX, TOP_GROUPS, SIZE, G, S)
            chosen = tl.zeros((K,), tl.int64)
            for k in range(TOP_K):
                best = tl.max(tl.max(value, 1), 0)
                one = tl.where((value == best) & inside, expert, n_experts)
                one = tl.min(tl.min(one, 1), 0)
                one = tl.minimum(one, n_experts - 1)  # comparisons with NaN are false
                value = tl.where(expert == one, float("-inf"), value)
                count += (expert == one).to(tl.int32)
                chosen = tl.where(choices == k, one.to(tl.int64), chosen)
            tl.store(at, chosen, mask=choices < TOP_K)
        score = tl.load(row + chosen, mask=choices < TOP_K, other=float("-inf"))
        score = tl.exp(score - largest) / total if SOFTMAX else tl.sigmoid(score)
        weight = _normalized(score, scale, NORMALISE)
        tl.store(weights_ptr + token * TOP_K + choices, weight, mask=choices < TOP_K)
    tl.atomic_add(counts_ptr + expert, count.to(tl.int64), mask=count > 0)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad_ptr, logits_ptr, ids_ptr, out_ptr, n_experts, scale,
    SOFTMAX: tl.constexpr, NORMALISE: tl.constexpr, TOP_K: tl.constexpr, K: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    experts, choices = tl.arange(0, E), tl.arange(0, K)
    row = logits_ptr + token * n_experts
    at, held = token * TOP_K + choices, choices < TOP_K
    score = tl.load(row + tl.load(ids_ptr + at, mask=held, other=0), mask=held, other=float("-inf"))
    grad = tl.load(grad_ptr + at, mask=held, other=0.0) * scale
    x = tl.load(row + experts, mask=experts < n_experts, other=float("-inf"))
    if SOFTMAX:
        largest = tl.max(x, 0)
        x = tl.exp(x - largest)
        total = tl.sum(x, 0)
        x, score = x / total, tl.exp(score - largest) / total
    else:
        score = tl.sigmoid(score)
    if NORMALISE:
        chosen = tl.sum(score, 0) + 1e-20
        grad = (grad - tl.sum(grad * score, 0) / chosen) / chosen
    if not SOFTMAX:
        grad = grad * score * (1 - score)
    out = tl.zeros((E,), tl.float32)
    for k in range(TOP_K):
        one = tl.load(ids_ptr + token * TOP_K + k)
        out += tl.where(experts == one, tl.sum(tl.where(choices == k, grad, 0.0), 0), 0.0)
    if SOFTMAX:
        out = x * (out - tl.sum(x * out, 0))
    tl.store(out_ptr + token * n_experts + experts, out, mask=experts < n_experts)
