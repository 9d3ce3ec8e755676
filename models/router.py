"""Which experts a token visits, and with what weight. The arithmetic is fp32, whatever the dtype
of the weights.

Scores are a softmax over all experts or a sigmoid of each logit. The choice takes the `top_k` best
of score + balancing bias, where wanted only within the `top_groups` best groups of neighbouring
experts, so that a token's experts lie on few nodes (DeepSeek-V2, arXiv:2405.04434, section
2.2.2). The weight of a chosen expert is its score without that bias. (Softmax over the chosen
logits, as Mixtral and GPT-OSS define it, is softmax over all with `norm_top_k`.)

Balancing without an auxiliary loss (arXiv:2408.15664): the bias moves by a fixed step against the
load, once per optimizer step, from the counts of all ranks.

T tokens, K experts per token, E experts, D model width, L MoE layers.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import Moe
from kernels.permute import count_choices


class Tape:
    """The expert choice of one pass through a router, for passes that must choose alike."""

    ids_TK: Tensor | None = None


class Router(nn.Module):
    """Scores, choice and routing weights; counts its choices while training."""

    tape: Tape | None = None
    """Where the next passes record their choice, or find it: recomputation replays, it never routes
    or counts again. Whoever recomputes sets it."""
    bias_E: Tensor
    tokens_per_expert_E: Tensor

    def __init__(self, d_model: int, config: Moe) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_experts, d_model))
        self.bias = nn.Parameter(torch.empty(config.n_experts)) if config.router_bias else None
        # no gradient: moved by `update_biases`; part of every checkpoint and export
        self.register_buffer("bias_E", torch.zeros(config.n_experts), persistent=True)
        # choices since the last `take_counts`
        counts = torch.zeros(config.n_experts, dtype=torch.int64)
        self.register_buffer("tokens_per_expert_E", counts, persistent=False)

    def float_bias(self) -> None:
        """Undo `module.to(dtype)` for the balancing bias: it is fp32 always."""
        self.bias_E = self.bias_E.float()

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids `[T, K]` (int64) and routing weights `[T, K]` (fp32)."""
        config = self.config
        bias = None if self.bias is None else self.bias.float()
        logits_TE = F.linear(x_TD.float(), self.weight.float(), bias)
        softmax = config.score_func == "softmax"
        scores_TE = logits_TE.softmax(-1) if softmax else logits_TE.sigmoid()
        ids_TK = self._decide(scores_TE.detach())
        weights_TK = scores_TE.gather(1, ids_TK)
        if config.norm_top_k:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return ids_TK, weights_TK * config.route_scale

    def _decide(self, scores_TE: Tensor) -> Tensor:
        """The choice, from the tape where that holds one already; else counted and recorded."""
        if self.tape is not None and self.tape.ids_TK is not None:
            return self.tape.ids_TK
        if self.config.force_balance:
            ids_TK = _round_robin(len(scores_TE), self.config, scores_TE.device)
        else:
            ids_TK = choose(scores_TE + self.bias_E, self.config)
        if self.training:
            self.tokens_per_expert_E += count_choices(ids_TK, self.config.n_experts)
        if self.tape is not None:
            self.tape.ids_TK = ids_TK
        return ids_TK


def choose(biased_TE: Tensor, config: Moe) -> Tensor:
    """Ids `[T, K]` of the experts with the best biased scores, within the best groups."""
    if config.top_groups < config.n_groups:
        groups_TGE = biased_TE.unflatten(1, (config.n_groups, -1))
        if config.score_func == "sigmoid":
            best_of_group = groups_TGE.topk(min(2, groups_TGE.shape[2]), dim=2).values.sum(2)
        else:
            best_of_group = groups_TGE.amax(2)
        kept = best_of_group.topk(config.top_groups, dim=1).indices
        outside = torch.ones_like(best_of_group, dtype=torch.bool).scatter_(1, kept, False)
        biased_TE = groups_TGE.masked_fill(outside[:, :, None], float("-inf")).flatten(1)
    return biased_TE.topk(config.top_k, dim=-1).indices


def _round_robin(n_tokens: int, config: Moe, device: torch.device) -> Tensor:
    flat = torch.arange(n_tokens * config.top_k, device=device) % config.n_experts
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
