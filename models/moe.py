"""Mixture of experts: dispatcher interface, experts, shared experts.

The router chooses `top_k` experts per token; the *dispatcher* sends the token's row to each of
them and sums the results. Expert parallelism replaces the dispatcher:
`run(x_TD, expert_ids_TK, weights_TK, experts, shared_experts, layer)`; the default here does not
communicate. `experts` is a callable on `Rows`, so a dispatcher may pass it any number of chunks;
`shared_experts` is work that does not depend on the communication.

T tokens, K experts per token, R rows, D model width, F expert width, E experts, e local experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import ModelConfig, MoEConfig
from kernels.grouped_gemm.grouped_gemm import grouped_gemm_nt
from kernels.mlp.mlp import swiglu_mlp
from kernels.mlp.swiglu import swiglu
from kernels.moe.permute import Permutation, combine_rows, gather_rows, permutation
from kernels.quantization.quantize import dequantize_1x128
from models.layers.local_view import LocalViews, local_view
from models.router import Router
from models.step_context import LayerContext
from models.tp_comm import TPComm


class Rows(NamedTuple):  # not a dataclass: FSDP2 of torch 2.11 finds tensors in pytrees only
    """Rows grouped by expert. Group e ends at `ends_e[e]` and has `counts_e[e]` true rows; rows
    between these and the next group are zero, with weight zero. Rows from the last end on belong
    to no expert, and their results are not read."""

    data: Tensor
    """`[R, D]`; FP8 if there are scales."""
    scales: Tensor | None
    """A scale per 128 values of a row (`kernels.quantization.quantize`), or None if `data` is not
    quantized."""
    weights_R: Tensor
    """Routing weight of every row, fp32."""
    ends_e: Tensor
    counts_e: Tensor
    align: int = 1
    """The creator guarantees that every group starts at a multiple of this."""
    stand_in: Tensor | None = None
    """For quantized rows: a tensor of their shape and dtype before quantization, without memory. It
    replaces them in autograd, where a gradient must have its tensor's dtype."""


ExpertsFn = Callable[[Rows], Tensor]


def row_values(rows: Rows) -> Tensor:
    """`[R, D]` in the compute dtype; the gradient passes through the quantization unchanged."""
    if rows.scales is None:
        return rows.data
    return _Dequantize.apply(rows.stand_in, rows.data, rows.scales)


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, data_RD: Tensor, scales_Rd: Tensor) -> Tensor:
        return dequantize_1x128(data_RD, scales_Rd, stand_in.dtype)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        return grad_RD, None, None


def rows_for(x_TD: Tensor, weights: Tensor, to: Permutation, align: int) -> Rows:
    """Tokens and their routing weights (as many as there are rows) in the order of `to`."""
    return Rows(
        data=gather_rows(x_TD, to),
        scales=None,
        weights_R=gather_rows(weights.reshape(-1, 1), to).squeeze(1),
        ends_e=to.ends_E,
        counts_e=to.counts_E,
        align=align,
    )


class Dispatcher(Protocol):
    """Sends rows to experts and returns their results; see the module docstring."""

    def run(
        self,
        x_TD: Tensor,
        expert_ids_TK: Tensor,
        weights_TK: Tensor,
        experts: ExpertsFn,
        shared_experts: Callable[[], Tensor] | None = None,
        layer: LayerContext | None = None,
    ) -> Tensor:
        """`y_TD`: the sum of each token's weighted expert outputs, plus `shared_experts()`.

        layer: counts the communication of a training step.
        """
        ...


class LocalDispatcher:
    """For local experts only: sort rows by expert, run the experts, sum the results per token."""

    def __init__(self, n_experts: int, align: int = 1) -> None:
        self.n_experts, self.align = n_experts, align

    def run(
        self,
        x_TD: Tensor,
        expert_ids_TK: Tensor,
        weights_TK: Tensor,
        experts: ExpertsFn,
        shared_experts: Callable[[], Tensor] | None = None,
        layer: LayerContext | None = None,
    ) -> Tensor:
        to = permutation(expert_ids_TK, self.n_experts, self.align)
        rows = rows_for(x_TD, weights_TK, to, self.align)
        y_TD = combine_rows(experts(rows), to, expert_ids_TK.shape[1])
        return y_TD if shared_experts is None else y_TD + shared_experts()


class Experts(LocalViews):
    """SwiGLU experts as two grouped GEMMs; gate and up share the first."""

    w13: Any = local_view("w13")
    w2: Any = local_view("w2")
    b13: Any = local_view("b13")
    b2: Any = local_view("b2")

    recompute_h: bool = False
    """Keep only gate and up, and recompute the activation in backward (without biases)."""

    def __init__(self, d_model: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        n, width = config.n_experts, config.d_expert
        self.register_parameter("w13", nn.Parameter(torch.empty(n, 2, width, d_model)))
        self.register_parameter("w2", nn.Parameter(torch.empty(n, d_model, width)))
        biases = config.expert_bias
        self.register_parameter("b13", nn.Parameter(torch.empty(n, 2, width)) if biases else None)
        self.register_parameter("b2", nn.Parameter(torch.empty(n, d_model)) if biases else None)

    def forward(self, rows: Rows) -> Tensor:
        """Weighted outputs `[R, D]`, row by row."""
        data_RD, weights_R = row_values(rows), rows.weights_R
        if self.config.weight_on == "input":
            data_RD = data_RD * weights_R[:, None].to(data_RD.dtype)
            weights_R = torch.ones_like(weights_R)
        if self.recompute_h and self.b13 is None and self.b2 is None:
            return swiglu_mlp(
                data_RD, self.w13.flatten(1, 2), self.w2, rows.ends_e, rows.counts_e, weights_R,
                self.config.activation,
            )  # fmt: skip
        gate_up = self.product(data_RD, "w13", rows)
        if self.b13 is not None:
            gate_up = gate_up + self._of_rows(self.b13.flatten(1), rows)
        # the weight may be applied before the down projection, which is linear (its bias: see
        # below)
        h_RF = swiglu(gate_up, weights_R, self.config.activation)
        y_RD = self.product(h_RF, "w2", rows)
        if self.b2 is not None:
            bias_RD = self._of_rows(self.b2, rows)
            y_RD = y_RD + bias_RD * weights_R[:, None].to(y_RD.dtype)
        return y_RD

    def product(self, x_RD: Tensor, name: str, rows: Rows) -> Tensor:
        """`x @ w.T` of every row with its expert's weight; gate and up of w13 are one matrix."""
        weight = self.w13.flatten(1, 2) if name == "w13" else self.w2
        return grouped_gemm_nt(x_RD, weight, rows.ends_e, rows.counts_e)

    @staticmethod
    def _of_rows(bias_eN: Tensor, rows: Rows) -> Tensor:
        """Every row's bias, `[R, N]`; zero for rows of no expert."""
        slots_R = torch.arange(rows.data.shape[0], device=rows.ends_e.device)
        expert_of_row = torch.searchsorted(rows.ends_e, slots_R, right=True)
        zero_1N = bias_eN.new_zeros(1, bias_eN.shape[1])
        return torch.cat([bias_eN, zero_1N]).index_select(0, expert_of_row)


class FeedForward(LocalViews):
    """Dense SwiGLU: the shared experts, and the dense first layers."""

    w13: Any = local_view("w13")
    w2: Any = local_view("w2")

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_parameter("w13", nn.Parameter(torch.empty(2, width, d_model)))
        self.register_parameter("w2", nn.Parameter(torch.empty(d_model, width)))
        self.tp_comm = TPComm()

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_up = F.linear(self.tp_comm.gather(x_TD), self.w13.flatten(0, 1))
        return self.tp_comm.reduce_scatter(F.linear(swiglu(gate_up), self.w2))


class MoE(nn.Module):
    """Router, routed experts and shared experts of one layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe = config.moe
        self.router = Router(config.d_model, moe)
        self.experts = Experts(config.d_model, moe)
        self.shared_experts: FeedForward | None = None
        if moe.n_shared_experts:
            self.shared_experts = FeedForward(config.d_model, moe.n_shared_experts * moe.d_expert)
        self.dispatcher: Dispatcher = LocalDispatcher(moe.n_experts)

    def forward(self, x_TD: Tensor, layer: LayerContext | None = None) -> Tensor:
        """layer: context of the training step, if there is one (`models.step_context`)."""
        ids_TK, weights_TK = self.router(x_TD, layer)
        shared = self.shared_experts
        shared_experts = None if shared is None else lambda: shared(x_TD)
        return self.dispatcher.run(x_TD, ids_TK, weights_TK, self.experts, shared_experts, layer)
