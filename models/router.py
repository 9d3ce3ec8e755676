"""The choice of a token's experts and their weights.

The arithmetic is fp32 for any dtype of the weights and is implemented in `kernels.moe.router`; this
module has the parameters, the counts, recording and replay of the choice, and balancing. (Softmax
over the chosen logits, as in Mixtral and GPT-OSS, is softmax over all with `norm_top_k`.)

Balancing without an auxiliary loss (arXiv:2408.15664): a bias on the scores moves by a fixed step
against the load, once per optimizer step, from the counts of all ranks; it affects the choice, not
the weights. Auxiliary losses: `models.balance`.

T tokens, K experts per token, E experts, D model width, L MoE layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import MoEConfig
from kernels.moe.router import RouterOptions, route, scores
from models.balance import attach, auxiliary_losses, coefficients, sequence_frequency
from models.step_context import LayerContext, RoutingDecision
from models.tp_comm import TPComm

_LEAST_ROWS = 8
"""See `kernels.grouped_gemm.grouped_gemm_cpu`."""


class Router(nn.Module):
    """Scores, choice and routing weights."""

    bias_E: Tensor

    def __init__(self, d_model: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.options = RouterOptions(
            config.top_k,
            config.score_func == "softmax",
            config.n_groups,
            config.top_groups,
            config.norm_top_k,
            config.route_scale,
        )
        self.weight = nn.Parameter(torch.empty(config.n_experts, d_model))
        self.bias = nn.Parameter(torch.empty(config.n_experts)) if config.router_bias else None
        # no gradient: changed by `update_biases`; part of every checkpoint and export
        self.register_buffer("bias_E", torch.zeros(config.n_experts), persistent=True)
        self.tp_comm = TPComm()

    def float_bias(self) -> None:
        """Undo `module.to(dtype)` for the balancing bias, which is always fp32."""
        self.bias_E = self.bias_E.float()

    def forward(self, x_TD: Tensor, layer: LayerContext | None = None) -> tuple[Tensor, Tensor]:
        """Expert ids `[T, K]` (int64) and routing weights `[T, K]` (fp32).

        layer: counts choices and adds up auxiliary losses in a training step, and records or
        replays the choice. None: none of this.
        """
        config = self.config
        bias = None if self.bias is None else self.bias.float()
        n_tokens, x_TD = len(x_TD), x_TD.float()
        if 0 < n_tokens < _LEAST_ROWS:  # fewer rows are summed in another order on a CPU
            x_TD = F.pad(x_TD, (0, 0, 0, _LEAST_ROWS - n_tokens))
        logits_TE = F.linear(x_TD, self.weight.float(), bias)
        if n_tokens < len(x_TD):
            logits_TE = logits_TE[:n_tokens]
        if layer is None:
            return self._route(logits_TE)[:2]
        if layer.step is None or layer.totals is None or not any(coefficients(config)):
            made, weights_TK = self._decide(logits_TE, None, layer)
            return made.ids_TK, weights_TK
        scores_TE = scores(logits_TE, self.options.softmax)
        made, weights_TK = self._decide(logits_TE, scores_TE, layer)
        losses_3 = auxiliary_losses(config, layer.step, logits_TE, scores_TE, made, self.tp_comm)
        return made.ids_TK, attach(weights_TK, losses_3, config, layer.totals.losses_3)

    def _decide(
        self, logits_TE: Tensor, scores_TE: Tensor | None, layer: LayerContext
    ) -> tuple[RoutingDecision, Tensor]:
        """The decision, made once per microbatch, and the weights, which are always recomputed.

        A recomputed pass reads the decision from `layer`; the first one counts the choice, computes
        the inputs of the balance losses and stores all of it there. scores_TE: required by these
        losses.
        """
        config, step = self.config, layer.step
        if layer.decision is not None:
            made = layer.decision
            return made, route(logits_TE, self.bias_E, self.options, made.ids_TK)[1]
        ids_TK, weights_TK, counts_E = self._route(logits_TE)
        load_E = frequency_NE = None
        if step is not None and layer.totals is not None:
            layer.totals.counts_E += counts_E
            if config.global_aux_loss_coef:
                load_E = step.reduce_counts(layer.totals.counts_E.clone())
            if scores_TE is not None and config.seq_aux_loss_coef:
                frequency_NE = sequence_frequency(
                    scores_TE.detach(), config.top_k, step, self.tp_comm
                )
        layer.decision = RoutingDecision(ids_TK, load_E, frequency_NE)
        return layer.decision, weights_TK

    def _route(self, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, weights and the counts of every expert, newly chosen."""
        given_TK = self._given_choice(logits_TE)
        ids_TK, weights_TK, counts_E = route(logits_TE, self.bias_E, self.options, given_TK)
        return ids_TK if given_TK is None else given_TK, weights_TK, counts_E  # no second copy

    def _given_choice(self, logits_TE: Tensor) -> Tensor | None:
        """Ids `[T, K]` that do not depend on the scores; None if the scores determine them."""
        config, n_tokens = self.config, len(logits_TE)
        if not config.force_balance:
            return None
        flat = torch.arange(n_tokens * config.top_k, device=logits_TE.device) % config.n_experts
        return flat.view(n_tokens, config.top_k)


def routers(model: nn.Module) -> list[Router]:
    """The routers of a model, first layer first."""
    return [module for module in model.modules() if isinstance(module, Router)]


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
