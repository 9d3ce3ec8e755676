"""Auxiliary losses of the router: their definitions, and the injection of their gradient.

| loss | of one layer | source |
|---|---|---|
| sequence | mean over sequences of sum_i f_i P_i, f_i = E / (K L) * choices of i in the sequence | DeepSeek-V3, arXiv:2412.19437, eq. 17-20 |
| global | sum_i f_i P_i, f_i = E / (K T) * choices of i in the batch of all ranks | arXiv:2501.11873 |
| z | mean over tokens of logsumexp(logits)^2 | ST-MoE, arXiv:2202.08906, eq. 5 |

P_i is the mean over the same tokens of expert i's score, scores divided by their sum. Both
balance losses are 1 if load and scores are even. The sequence loss counts the `top_k` best
scores, before bias and groups (as in eq. 18); the global one counts the actual choices.
The losses of all layers are added; all is fp32.

World-size independence: a rank adds the sum over its tokens divided by the tokens of the whole
step, never its local mean. The global loss uses the choices of all data ranks in all microbatches
of the step up to the current one (the buffer of arXiv:2501.11873, section 3): later ones are not
known when the gradient is computed. So N ranks equal one process with as many microbatches.

The gradient is injected: `attach` is the identity on the routing weights, and adds the gradient of
the losses in backward. So the loss need not be returned to the trainer. Its reported value is
added up in backward, which runs once, even if activation recomputation runs forward twice.
(The idea is that of Megatron's MoEAuxLossAutoScaler.)

T tokens, E experts, K experts per token, N sequences, L their length.
"""  # noqa: E501

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from configs.model import MoEConfig
from kernels.moe.topk import top_indices
from models.step_context import AUXILIARY_LOSSES, RoutingDecision, StepContext
from models.tp_comm import TPComm


def coefficients(config: MoEConfig) -> tuple[float, float, float]:
    """Factors of the losses, in the order of `AUXILIARY_LOSSES`; 0: the loss is not computed."""
    return config.seq_aux_loss_coef, config.global_aux_loss_coef, config.router_z_loss_coef


def auxiliary_losses(
    config: MoEConfig,
    step: StepContext,
    logits_TE: Tensor,
    scores_TE: Tensor,
    made: RoutingDecision,
    tp_comm: TPComm,
) -> Tensor:
    """The share of these tokens in each loss of one layer, without coefficients, fp32 `[3]`."""
    sequence, over_all, z = coefficients(config)
    zero = logits_TE.new_zeros(())
    parts = [zero, zero, zero]
    if sequence or over_all:
        shares_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
        if sequence:
            assert made.frequency_NE is not None
            # a sequence's P is a mean over its tokens, the step's loss a mean over its sequences:
            # together a sum over tokens, divided by the tokens of the step
            share_NE = torch.zeros_like(made.frequency_NE)
            share_NE = share_NE.index_add(0, _sequences(shares_TE, step, tp_comm), shares_TE)
            parts[0] = (made.frequency_NE * share_NE).sum() / step.tokens
        if over_all:
            assert made.load_E is not None
            frequency_E = made.load_E.double() * (config.n_experts / made.load_E.sum())
            parts[1] = (shares_TE.sum(0) * frequency_E.float()).sum() / step.tokens
    if z:
        parts[2] = logits_TE.logsumexp(-1).square().sum() / step.tokens
    return torch.stack(parts)


def sequence_frequency(scores_TE: Tensor, top_k: int, step: StepContext, tp_comm: TPComm) -> Tensor:
    """f_i of every sequence of the microbatch, `[N, E]`; a sequence may span several ranks."""
    chosen_TE = torch.zeros_like(scores_TE).scatter_(1, top_indices(scores_TE, top_k), 1.0)
    n_ranks = 1 if tp_comm.group is None else tp_comm.group.size()
    n_sequences = scores_TE.shape[0] * n_ranks // step.seq_len
    counts_NE = chosen_TE.new_zeros(n_sequences, scores_TE.shape[1])
    counts_NE.index_add_(0, _sequences(scores_TE, step, tp_comm), chosen_TE)
    return tp_comm.sum(counts_NE) * (scores_TE.shape[1] / (top_k * step.seq_len))


def _sequences(scores_TE: Tensor, step: StepContext, tp_comm: TPComm) -> Tensor:
    """The sequence of each of this rank's tokens, `[T]`."""
    n_tokens = scores_TE.shape[0]
    index_T = torch.arange(n_tokens, device=scores_TE.device) + tp_comm.place * n_tokens
    return index_T // step.seq_len


def attach(weights_TK: Tensor, losses_3: Tensor, config: MoEConfig, totals_3: Tensor) -> Tensor:
    """Return `weights_TK` unchanged; backward adds the gradient of the losses, coefficients
    included, and adds their values to `totals_3`."""
    pairs = zip(coefficients(config), losses_3.unbind(), strict=True)
    total = torch.stack([factor * loss for factor, loss in pairs]).sum()
    return _Attach.apply(weights_TK, total, losses_3.detach(), totals_3)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights_TK: Tensor, total: Tensor, losses_3: Tensor, totals_3: Tensor
    ) -> Tensor:
        ctx.save_for_backward(losses_3)
        ctx.totals_3 = totals_3  # not saved: it changes between forward and backward
        return weights_TK.clone()  # FSDP2 allows no view as a module output

    @staticmethod
    def backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (losses_3,) = ctx.saved_tensors
        ctx.totals_3 += losses_3
        return grad_TK, torch.ones_like(losses_3[0]), None, None


def mean_losses(
    config: MoEConfig, step: StepContext, reduce: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """The auxiliary losses in use, of the whole step without coefficients, averaged over layers.

    reduce: sums a tensor over all data ranks, which call this together.
    """
    used = dict(zip(AUXILIARY_LOSSES, coefficients(config), strict=True))
    layers = step.moe_layers
    if not layers or not any(used.values()):
        return {}
    sums_3 = reduce(torch.stack([totals.losses_3 for totals in layers]).sum(0))
    means = (sums_3 / len(layers)).tolist()
    return {name: mean for name, mean in zip(used, means, strict=True) if used[name]}
