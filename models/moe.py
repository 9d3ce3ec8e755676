"""Mixture of experts: router, dispatch seam, experts, balancing bias.

A token's path: the router scores all experts in fp32 and chooses `top_k`; the *dispatcher* brings
the token's row to each chosen expert and sums what comes back. The dispatcher is the seam where
expert parallelism enters: `run(x_TD, expert_ids_TK, weights_TK, experts, beside)`; the default
here communicates nothing. `experts` is a callable on `Rows`, so a dispatcher may feed it any
number of chunks; `beside` is work that does not depend on the exchange (shared experts).

Balancing without an auxiliary loss (arXiv:2408.15664): a bias per expert is added to the scores
for the choice only, and moves by a fixed step against the load, once per optimizer step.

T tokens, K experts per token, R rows, D model width, F expert width, E experts, e local experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import Model, Moe
from kernels.grouped_gemm import grouped_gemm_nt, row_alignment
from kernels.permute import Permutation, combine_rows, gather_rows, permutation
from kernels.swiglu import swiglu


@dataclass(frozen=True)
class Rows:
    """Rows grouped by expert. Group e ends at `ends_e[e]` and has `counts_e[e]` true rows; rows
    between these and the next group are zero, with weight zero."""

    data: Tensor
    """`[R, D]`."""
    scales: Tensor | None
    """Quantisation scales of `data`, or None where it is not quantised."""
    weights_R: Tensor
    """Routing weight of every row, fp32."""
    ends_e: Tensor
    counts_e: Tensor


ExpertsFn = Callable[[Rows], Tensor]


def rows_for(x_TD: Tensor, weights: Tensor, to: Permutation) -> Rows:
    """Tokens and their routing weights (as many as there are rows) in the order of `to`."""
    return Rows(
        data=gather_rows(x_TD, to),
        scales=None,
        weights_R=gather_rows(weights.reshape(-1, 1), to)[:, 0],
        ends_e=to.ends_E,
        counts_e=to.counts_E,
    )


class Dispatcher(Protocol):
    """Brings rows to experts and their results back; see the head of this file."""

    def run(
        self,
        x_TD: Tensor,
        expert_ids_TK: Tensor,
        weights_TK: Tensor,
        experts: ExpertsFn,
        beside: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """`y_TD`: the sum of each token's weighted expert outputs, plus `beside()`."""
        ...


class LocalDispatcher:
    """All experts are here: sort rows by expert, run them, sum them back."""

    def __init__(self, n_experts: int) -> None:
        self.n_experts = n_experts

    def run(
        self,
        x_TD: Tensor,
        expert_ids_TK: Tensor,
        weights_TK: Tensor,
        experts: ExpertsFn,
        beside: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        align = row_alignment(expert_ids_TK.numel(), self.n_experts, x_TD.device)
        to = permutation(expert_ids_TK, self.n_experts, align)
        y_TD = combine_rows(experts(rows_for(x_TD, weights_TK, to)), to, expert_ids_TK.shape[1])
        return y_TD if beside is None else y_TD + beside()


class Router(nn.Module):
    """Scores, choice and routing weights, all in fp32; counts its choices while training."""

    bias_E: Tensor
    tokens_per_expert_E: Tensor

    def __init__(self, d_model: int, config: Moe) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_experts, d_model))
        # no gradient: moved by `update_biases`; part of every checkpoint and export
        self.register_buffer("bias_E", torch.zeros(config.n_experts), persistent=True)
        # choices since the last `take_counts`
        self.register_buffer("tokens_per_expert_E", torch.zeros(config.n_experts), persistent=False)

    def float_buffers(self) -> None:
        """Undo the rounding type of `module.to(dtype)`: bias and counts are fp32 always."""
        self.bias_E = self.bias_E.float()
        self.tokens_per_expert_E = self.tokens_per_expert_E.float()

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids `[T, K]` (int64) and routing weights `[T, K]` (fp32)."""
        config = self.config
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        if config.score_func == "softmax":
            scores_TE = logits_TE.softmax(-1)
        else:
            scores_TE = logits_TE.sigmoid()
        if config.force_balance:
            ids_TK = _round_robin(x_TD.shape[0], config, x_TD.device)
        else:
            ids_TK = (scores_TE.detach() + self.bias_E).topk(config.top_k, dim=-1).indices
        weights_TK = scores_TE.gather(1, ids_TK)
        if config.norm_top_k:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        if self.training:
            counts = torch.bincount(ids_TK.reshape(-1), minlength=config.n_experts)
            self.tokens_per_expert_E += counts
        return ids_TK, weights_TK * config.route_scale


def _round_robin(n_tokens: int, config: Moe, device: torch.device) -> Tensor:
    flat = torch.arange(n_tokens * config.top_k, device=device) % config.n_experts
    return flat.view(n_tokens, config.top_k)


class Experts(nn.Module):
    """SwiGLU experts as two grouped GEMMs; gate and up share the first."""

    def __init__(self, d_model: int, config: Moe) -> None:
        super().__init__()
        n, width = config.n_experts, config.d_expert
        self.w13 = nn.Parameter(torch.empty(n, 2, width, d_model))
        self.w2 = nn.Parameter(torch.empty(n, d_model, width))

    def weights(self) -> tuple[Tensor, Tensor]:
        """`w13_e2FD` and `w2_eDF` of the experts held here. Expert parallelism replaces this."""
        return self.w13, self.w2

    def forward(self, rows: Rows) -> Tensor:
        """Weighted outputs `[R, D]`, row by row."""
        w13_e2FD, w2_eDF = self.weights()
        gate_up = grouped_gemm_nt(rows.data, w13_e2FD.flatten(1, 2), rows.ends_e, rows.counts_e)
        h_RF = swiglu(gate_up, rows.weights_R)
        return grouped_gemm_nt(h_RF, w2_eDF, rows.ends_e, rows.counts_e)


class FeedForward(nn.Module):
    """Dense SwiGLU: the shared experts, and the first layers where they are dense."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(2, width, d_model))
        self.w2 = nn.Parameter(torch.empty(d_model, width))

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.linear(swiglu(F.linear(x_TD, self.w13.flatten(0, 1))), self.w2)


class MoE(nn.Module):
    """Router, routed experts and shared experts of one layer."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        moe = config.moe
        self.router = Router(config.d_model, moe)
        self.experts = Experts(config.d_model, moe)
        self.shared_experts: FeedForward | None = None
        if moe.n_shared_experts:
            self.shared_experts = FeedForward(config.d_model, moe.n_shared_experts * moe.d_expert)
        self.dispatcher: Dispatcher = LocalDispatcher(moe.n_experts)

    def forward(self, x_TD: Tensor) -> Tensor:
        ids_TK, weights_TK = self.router(x_TD)
        shared = self.shared_experts
        beside = None if shared is None else lambda: shared(x_TD)
        return self.dispatcher.run(x_TD, ids_TK, weights_TK, self.experts, beside)


def routers(model: nn.Module) -> list[Router]:
    """The routers of a model, first layer first."""
    return [module for module in model.modules() if isinstance(module, Router)]


def take_counts(model: nn.Module, reduce_counts: Callable[[Tensor], Tensor]) -> Tensor:
    """Choices per layer and expert since the last call, `[n_moe_layers, E]`, and start anew.

    reduce_counts: sums a tensor over all data ranks (the seam of parallelism); one call serves
    all layers.
    """
    found = routers(model)
    if not found:
        return torch.zeros(0, 1)
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
    step_LE = torch.sign(counts_LE.mean(1, keepdim=True) - counts_LE)
    step_LE = step_LE - step_LE.mean(1, keepdim=True)
    for router, step_E in zip(found, step_LE, strict=True):
        router.bias_E += router.config.bias_update_rate * step_E
