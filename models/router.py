"""Which experts a token visits, and with what weight. The arithmetic is fp32, whatever the dtype
of the weights, and `kernels.moe.router` has it; here is what surrounds it: parameters, counts, what
is decided once and replayed, and balance. (Softmax over the chosen logits, as Mixtral and GPT-OSS
define it, is softmax over all with `norm_top_k`.)

Balancing without an auxiliary loss (arXiv:2408.15664): a bias on the scores moves by a fixed step
against the load, once per optimizer step, from the counts of all ranks; it takes part in the
choice, not in the weights. Auxiliary losses: `models.balance`.

T tokens, K experts per token, E experts, D model width, L MoE layers.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import MoEConfig
from kernels.moe.router import RouterOptions, route, scores
from models.balance import (
    NAMES,
    RoutingDecision,
    StepScope,
    attach,
    auxiliary_losses,
    coefficients,
    sequence_frequency,
)
from models.tp_comm import TPComm


class Tape:
    """What a router decided in one pass, for passes that must decide alike."""

    decision: RoutingDecision | None = None


class Router(nn.Module):
    """Scores, choice and routing weights; counts its choices while training."""

    tape: Tape | None = None
    """Where the next passes record what they decide, or find it: recomputation replays, it never
    routes or counts again. Whoever recomputes sets it."""
    bias_E: Tensor
    tokens_per_expert_E: Tensor
    loss_values_3: Tensor

    def __init__(self, d_model: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.rule = RouterOptions(
            config.top_k,
            config.score_func == "softmax",
            config.n_groups,
            config.top_groups,
            config.norm_top_k,
            config.route_scale,
        )
        self.weight = nn.Parameter(torch.empty(config.n_experts, d_model))
        self.bias = nn.Parameter(torch.empty(config.n_experts)) if config.router_bias else None
        # no gradient: moved by `update_biases`; part of every checkpoint and export
        self.register_buffer("bias_E", torch.zeros(config.n_experts), persistent=True)
        # choices since the last `take_counts`
        counts = torch.zeros(config.n_experts, dtype=torch.int64)
        self.register_buffer("tokens_per_expert_E", counts, persistent=False)
        # auxiliary losses since the last `take_losses`
        self.register_buffer("loss_values_3", torch.zeros(len(NAMES)), persistent=False)
        self.tp_comm = TPComm()
        # of the running optimizer step; without one the auxiliary losses are not trained
        self.scope: StepScope | None = None

    def float_bias(self) -> None:
        """Undo `module.to(dtype)` for the balancing bias: it is fp32 always."""
        self.bias_E = self.bias_E.float()

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids `[T, K]` (int64) and routing weights `[T, K]` (fp32)."""
        config = self.config
        bias = None if self.bias is None else self.bias.float()
        logits_TE = F.linear(x_TD.float(), self.weight.float(), bias)
        scores_TE = None
        if self.training and self.scope is not None and any(coefficients(config)):
            scores_TE = scores(logits_TE, self.rule.softmax)
        made, weights_TK = self._decide(logits_TE, scores_TE)
        if scores_TE is not None:
            assert self.scope is not None
            losses_3 = auxiliary_losses(
                config, self.scope, logits_TE, scores_TE, made, self.tp_comm
            )
            weights_TK = attach(weights_TK, losses_3, config, self.loss_values_3)
        return made.ids_TK, weights_TK

    def _decide(
        self, logits_TE: Tensor, scores_TE: Tensor | None
    ) -> tuple[RoutingDecision, Tensor]:
        """What is decided once per microbatch, from the tape where that holds it already; else
        the choice is counted, what the balance losses need is collected, and all is recorded. And
        the weights, which are always computed anew. scores_TE: where the losses need them."""
        config = self.config
        if self.tape is not None and self.tape.decision is not None:
            made = self.tape.decision
            return made, route(logits_TE, self.bias_E, self.rule, made.ids_TK)[1]
        given_TK = self._given_choice(logits_TE)
        ids_TK, weights_TK, counts_E = route(logits_TE, self.bias_E, self.rule, given_TK)
        ids_TK = ids_TK if given_TK is None else given_TK  # not a second copy
        load_E = frequency_NE = None
        if self.training:
            self.tokens_per_expert_E += counts_E
            if self.scope is not None and config.global_aux_loss_coef:
                load_E = self.scope.reduce_counts(self.tokens_per_expert_E.clone())
            if self.scope is not None and config.seq_aux_loss_coef:
                assert scores_TE is not None
                frequency_NE = sequence_frequency(
                    scores_TE.detach(), config.top_k, self.scope, self.tp_comm
                )
        made = RoutingDecision(ids_TK, load_E, frequency_NE)
        if self.tape is not None:
            self.tape.decision = made
        return made, weights_TK

    def _given_choice(self, logits_TE: Tensor) -> Tensor | None:
        """Ids `[T, K]` that do not depend on the scores; None: the scores decide."""
        config, n_tokens = self.config, len(logits_TE)
        if not config.force_balance:
            return None
        flat = torch.arange(n_tokens * config.top_k, device=logits_TE.device) % config.n_experts
        return flat.view(n_tokens, config.top_k)


def routers(model: nn.Module) -> list[Router]:
    """The routers of a model, first layer first."""
    return [module for module in model.modules() if isinstance(module, Router)]


def take_counts(model: nn.Module, reduce_counts: Callable[[Tensor], Tensor]) -> Tensor:
    """Choices per layer and expert since the last call, `[L, E]`, and start anew.

    reduce_counts: sums a tensor over all data ranks (the seam of parallelism); one call serves
    all layers.
    """
    found = routers(model)
    if not found:
        return torch.zeros(0, 1, dtype=torch.int64)
    counts_LE = reduce_counts(torch.stack([r.tokens_per_expert_E for r in found]))
    for router in found:
        router.tokens_per_expert_E.zero_()
    return counts_LE


def open_step(model: nn.Module, scope: StepScope) -> None:
    """Tell the routers of an optimizer step, so that they train the auxiliary losses."""
    for router in routers(model):
        router.scope = scope


def take_losses(model: nn.Module, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """The auxiliary losses in use since the last call, without coefficients, mean over layers.

    reduce: sums a tensor over all data ranks.
    """
    found = routers(model)
    used = dict(zip(NAMES, coefficients(found[0].config), strict=True)) if found else {}
    if not any(used.values()):
        return {}
    sums_3 = reduce(torch.stack([r.loss_values_3 for r in found]).sum(0))
    for router in found:
        router.loss_values_3.zero_()
    means = (sums_3 / len(found)).tolist()
    return {name: mean for name, mean in zip(NAMES, means, strict=True) if used[name]}


def update_biases(model: nn.Module, counts_LE: Tensor) -> None:
    """Move every balancing bias one step against its load (arXiv:2408.15664, Algorithm 1).

    Once per optimizer step, with the global counts of that step. The mean is removed, since only
    differences between biases matter.
    """
    found = [r for r in routers(model) if r.config.bias_update_rate]
    if not found:
        return
    load_LE = counts_LE.double()  # int64 counts
    step_LE = torch.sign(load_LE.mean(1, keepdim=True) - load_LE).float()
    step_LE = step_LE - step_LE.mean(1, keepdim=True)
    for router, step_E in zip(found, step_LE, strict=True):
        router.bias_E += router.config.bias_update_rate * step_E
