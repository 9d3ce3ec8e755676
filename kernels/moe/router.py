"""The router's arithmetic: from logits to expert ids, routing weights and counts.

Scores are a softmax over all experts or a sigmoid of each logit. The choice is the `top_k` best
of score + balancing bias, optionally only within the `top_groups` best groups of consecutive
experts, so that a token's experts are on few nodes (DeepSeek-V2, arXiv:2405.04434, section
2.2.2); a group's score is its best expert (softmax) or the sum of its two best (sigmoid). The
weight of a chosen expert is its score without that bias, optionally divided by the sum of the
chosen ones.

Why one operation: as torch operations it is some twenty launches over `[T, E]`, each far too small
for a GPU, and keeps the scores for backward. Here logits are read once, forward and backward, and
only they and the ids are kept. All is fp32: the choice is discrete, so a rounding error can change
a whole expert.

The lowest index of equal scores (a saturated sigmoid, experts that were copied) is always chosen,
so that runs repeat bit for bit. Counts are integers, whose sum does not depend on the order.

A choice may be an argument instead: recomputation replays one, and it must be the same operation
that forward used, since selective recomputation identifies operations by name.

T tokens, K experts per token, E experts, G groups of S experts.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import device
from kernels.moe.permute import count_choices
from kernels.moe.topk import top_indices
from kernels.threads import VECTOR, whole_rows

_NARROW = 16
"""Experts below which torch's softmax on a CPU is slower than its definition (8 experts: 0.22 ms
against 0.05 for 2,048 tokens)."""


class RouterOptions(NamedTuple):
    """Options of the choice and the weights of experts."""

    top_k: int
    softmax: bool
    """Scores: softmax over all experts, else a sigmoid of each."""
    n_groups: int = 1
    """Groups of neighboring experts."""
    top_groups: int = 1
    """Groups that a token may choose from."""
    normalize: bool = True
    """Divide the chosen scores by their sum."""
    scale: float = 1.0
    """Factor on the weights."""


def route(
    logits_TE: Tensor, bias_E: Tensor, rule: RouterOptions, given_TK: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Expert ids `[T, K]` (int64), best first; their weights `[T, K]` (fp32); and how often every
    expert was chosen, `[E]` (int64). The weights are differentiable in the logits.

    logits_TE: fp32. bias_E: fp32, added to the scores for the choice only. given_TK: an earlier
    choice to use instead.
    """
    weights_TK, ids_TK, counts_E = _route(logits_TE, bias_E, given_TK, *rule)
    return ids_TK, weights_TK, counts_E


def route_reference(
    logits_TE: Tensor, bias_E: Tensor, rule: RouterOptions, given_TK: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain-torch form of `route`."""
    scores_TE = scores(logits_TE, True) if rule.softmax else _sigmoid(logits_TE)
    ids_TK = choose(scores_TE.detach() + bias_E, rule) if given_TK is None else given_TK.clone()
    weights_TK = scores_TE.gather(1, ids_TK)
    if rule.normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return ids_TK, weights_TK * rule.scale, count_choices(ids_TK, logits_TE.shape[1])


def route_backward_reference(
    grad_TK: Tensor, logits_TE: Tensor, ids_TK: Tensor, rule: RouterOptions
) -> Tensor:
    """Gradient of the weights of `route` for the logits."""
    scores_TE = scores(logits_TE, rule.softmax)
    chosen_TK, grad_TK = scores_TE.gather(1, ids_TK), grad_TK * rule.scale
    if rule.normalize:
        total_T1 = chosen_TK.sum(-1, keepdim=True) + 1e-20
        grad_TK = (grad_TK - (grad_TK * chosen_TK).sum(-1, keepdim=True) / total_T1) / total_T1
    if not rule.softmax:
        grad_TK = grad_TK * chosen_TK * (1 - chosen_TK)
    grad_TE = torch.zeros_like(logits_TE).scatter_add_(1, ids_TK, grad_TK)
    if rule.softmax:
        if logits_TE.shape[1] >= _NARROW:
            return torch.ops.aten._softmax_backward_data(grad_TE, scores_TE, -1, torch.float32)
        grad_TE = (grad_TE - (grad_TE * scores_TE).sum(-1, keepdim=True)).mul_(scores_TE)
    return grad_TE


def scores(logits_TE: Tensor, softmax: bool) -> Tensor:
    """Every expert's score, `[T, E]`."""
    if not softmax:
        return logits_TE.sigmoid()
    if logits_TE.shape[1] >= _NARROW:
        return logits_TE.softmax(-1)
    powers_TE = (logits_TE - logits_TE.detach().amax(-1, keepdim=True)).exp()
    return powers_TE / powers_TE.sum(-1, keepdim=True)


def _sigmoid(logits_TE: Tensor) -> Tensor:
    """On a CPU every element uses torch's vector code for any number of tokens, so that a token's
    scores do not depend on the other tokens (`kernels.threads`)."""
    n = logits_TE.numel()
    whole = whole_rows(-(-n // VECTOR), VECTOR) * VECTOR
    if logits_TE.device.type != "cpu" or whole == n:
        return logits_TE.sigmoid()
    padded = F.pad(logits_TE.reshape(-1), (0, whole - n)).sigmoid()
    return padded[:n].view(logits_TE.shape)


def choose(biased_TE: Tensor, rule: RouterOptions) -> Tensor:
    """Ids `[T, K]` of the experts with the best biased scores, within the best groups, best first;
    of equal scores the lowest index is first."""
    if rule.top_groups < rule.n_groups:
        groups_TGS = biased_TE.unflatten(1, (rule.n_groups, -1))
        n_best = 1 if rule.softmax else min(2, groups_TGS.shape[2])
        best_TG = groups_TGS.topk(n_best, dim=2).values.sum(2)
        kept = top_indices(best_TG, rule.top_groups)
        outside_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter_(1, kept, False)
        biased_TE = groups_TGS.masked_fill(outside_TG[:, :, None], float("-inf")).flatten(1)
    return top_indices(biased_TE, rule.top_k)


@torch.library.custom_op("phalanx::route", mutates_args=())
def _route(
    logits_TE: Tensor, bias_E: Tensor, given_TK: Tensor | None, top_k: int, softmax: bool,
    n_groups: int, top_groups: int, normalize: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Weights, ids and counts: differentiable results come first, as `opcheck` requires."""
    rule = RouterOptions(top_k, softmax, n_groups, top_groups, normalize, scale)
    if device.on_accelerator(logits_TE):
        from kernels.moe.router_triton import route as launch

        with device.launching_on(logits_TE):
            ids_TK, weights_TK, counts_E = launch(logits_TE, bias_E, given_TK, *rule)
    else:
        ids_TK, weights_TK, counts_E = route_reference(logits_TE, bias_E, rule, given_TK)
    return weights_TK, ids_TK, counts_E


@_route.register_fake
def _(
    logits_TE: Tensor, bias_E: Tensor, given_TK: Tensor | None, top_k: int, softmax: bool,
    n_groups: int, top_groups: int, normalize: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n_tokens, n_experts = logits_TE.shape
    return (
        logits_TE.new_empty(n_tokens, top_k),
        logits_TE.new_empty(n_tokens, top_k, dtype=torch.int64),
        logits_TE.new_empty(n_experts, dtype=torch.int64),
    )


@torch.library.custom_op("phalanx::route_backward", mutates_args=())
def _backward(
    grad_TK: Tensor, logits_TE: Tensor, ids_TK: Tensor, softmax: bool, normalize: bool, scale: float
) -> Tensor:
    if device.on_accelerator(logits_TE):
        from kernels.moe.router_triton import backward as launch

        with device.launching_on(logits_TE):
            return launch(grad_TK, logits_TE, ids_TK, softmax, normalize, scale)
    rule = RouterOptions(ids_TK.shape[1], softmax, normalize=normalize, scale=scale)
    return route_backward_reference(grad_TK, logits_TE, ids_TK, rule)


@_backward.register_fake
def _(
    grad_TK: Tensor, logits_TE: Tensor, ids_TK: Tensor, softmax: bool, normalize: bool, scale: float
) -> Tensor:
    return logits_TE.new_empty(logits_TE.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits_TE, _, given_TK, _, softmax, _, _, normalize, scale = inputs
    ctx.save_for_backward(logits_TE, output[1] if given_TK is None else given_TK)
    ctx.how = softmax, normalize, scale


def _gradients(ctx: Any, grad_TK: Tensor, ids: None, counts: None) -> tuple[Tensor | None, ...]:
    return _backward(grad_TK, *ctx.saved_tensors, *ctx.how), *[None] * 8


_route.register_autograd(_gradients, setup_context=_save)
