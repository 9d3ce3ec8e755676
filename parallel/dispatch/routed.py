"""The dispatcher over plans: chunks of tokens, overlap, and the gradients of the exchanges.

Every exchange has a start and an end, each a node of the graph: forward launches in the first and
waits in the second; backward launches in the second's gradient and waits in the first's. Autograd
runs nodes in the opposite order of their creation. What ran between the two in forward (experts of
another chunk, shared experts) therefore runs between them in backward, too: backward overlaps as
forward does, without separate code.

With the format "compute" the result is exact, up to the order of sums. FP8 rounds the rows that are
sent; the gradient treats that rounding as the identity (straight through), and gradients that are
sent as FP8 are rounded likewise. Routing weights and their gradients are always fp32.

T tokens, K experts per token, P slots of rows, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs.dispatch import DispatchConfig
from models.moe import ExpertsFn, Rows
from models.step_context import DispatchStats, LayerContext
from parallel.dispatch.packed_rows import PackedRows
from parallel.dispatch.plan import DispatchPlan, Planner, WireFormats

Tensors = tuple[Tensor | None, ...]


class RoutedDispatcher:
    """`models.moe.Dispatcher` with plans, one chunk of tokens after another."""

    def __init__(
        self, planner: Planner, options: DispatchConfig, power_of_two: bool = False
    ) -> None:
        """power_of_two: round the scales of rows sent in FP8 up to powers of two."""
        self.planner, self.options = planner, options
        self.wires = WireFormats.of(options, power_of_two)

    @torch.compiler.disable  # splits are read on the host, and differ in every layer
    def run(
        self,
        x_TD: Tensor,
        expert_ids_TK: Tensor,
        weights_TK: Tensor,
        experts: ExpertsFn,
        shared_experts: Callable[[], Tensor] | None = None,
        layer: LayerContext | None = None,
    ) -> Tensor:
        n = self.options.chunks  # the same on all ranks, for any number of tokens
        sizes = [len(x_TD) // n + (i < len(x_TD) % n) for i in range(n)]
        x, weights = x_TD.split(sizes), weights_TK.split(sizes)
        stats, exact = DispatchStats(), True  # only a training step can be repeated
        if layer is not None and layer.step is not None and layer.totals is not None:
            stats, exact = layer.totals.dispatch, layer.step.exact_dispatch
        plans = self.planner.plan(list(expert_ids_TK.split(sizes)), stats, exact)
        arriving = [_started(_Dispatch(plans[0], self.wires), x[0], weights[0])]
        returning, shared_TD = [], None
        for i, plan in enumerate(plans):
            if i + 1 < n:
                following = _Dispatch(plans[i + 1], self.wires)
                arriving.append(_started(following, x[i + 1], weights[i + 1]))
            if i == 0 and shared_experts is not None:
                shared_TD = shared_experts()
            rows_PD = experts(_arrived(arriving[i], plan, self.planner.align))
            returning.append(_started(_Combine(plan, self.wires), rows_PD))
        done = [_End.apply(exchange, token)[0] for exchange, token in returning]
        y_TD: Tensor = done[0] if n == 1 else torch.cat(done)
        return y_TD if shared_TD is None else y_TD + shared_TD


@dataclass
class _Dispatch:
    """Tokens to experts, and the gradients back. `pending` is the handle of the communication.

    The graph holds it, so it must not hold tensors of the graph: that cycle would never be freed.
    """

    plan: DispatchPlan
    wires: WireFormats
    pending: Any = None
    dtype: torch.dtype = torch.float32
    """Dtype of the rows in autograd."""
    arrived: PackedRows | None = None
    """Rows in FP8, which bypass autograd, until `_arrived` reads them."""

    def start(self, x_TD: Tensor, weights_TK: Tensor) -> None:
        self.dtype = x_TD.dtype
        self.pending = self.plan.start_dispatch(x_TD, weights_TK, self.wires.dispatch)

    def finish(self) -> Tensors:
        rows, self.pending = self.plan.finish_dispatch(self.pending), None
        self.arrived = rows
        assert rows.extra is not None
        if rows.scales is None:
            return rows.data, rows.extra[:, 0]
        return rows.extra.new_zeros(1, dtype=self.dtype).expand(rows.data.shape), rows.extra[:, 0]

    def start_gradient(self, grad_PD: Tensor, grad_P: Tensor) -> None:
        wire = self.wires.dispatch_grad
        self.pending = self.plan.start_combine(grad_PD, grad_P[:, None], wire)

    def finish_gradient(self) -> Tensors:
        gradients, self.pending = self.plan.finish_combine(self.pending, self.dtype), None
        return gradients


@dataclass
class _Combine:
    """Outputs of experts back to tokens, and the gradients to experts; otherwise as `_Dispatch`."""

    plan: DispatchPlan
    wires: WireFormats
    pending: Any = None
    dtype: torch.dtype = torch.float32

    def start(self, rows_PD: Tensor) -> None:
        self.dtype = rows_PD.dtype
        self.pending = self.plan.start_combine(rows_PD, None, self.wires.combine)

    def finish(self) -> Tensors:
        combined, self.pending = self.plan.finish_combine(self.pending, self.dtype), None
        return (combined.y_TD,)

    def start_gradient(self, grad_TD: Tensor) -> None:
        self.pending = self.plan.start_dispatch(grad_TD, None, self.wires.combine_grad)

    def finish_gradient(self) -> Tensors:
        rows, self.pending = self.plan.finish_dispatch(self.pending), None
        return (rows.values(self.dtype),)


_Exchange = _Dispatch | _Combine


def _started(exchange: _Exchange, *inputs: Tensor) -> tuple[Any, Tensor]:
    """Launch it; the second result connects its end to its start in the graph."""
    return exchange, _Start.apply(exchange, *inputs)


def _arrived(started: tuple[Any, Tensor], plan: DispatchPlan, align: int) -> Rows:
    """Wait for the rows sent to this rank."""
    dispatch, token = started
    data_PD, weights_P = _End.apply(dispatch, token)
    rows, dispatch.arrived = dispatch.arrived, None
    if rows.scales is None:
        return Rows(data_PD, None, weights_P, plan.ends_e, plan.counts_e, align)
    groups = weights_P, plan.ends_e, plan.counts_e, align
    return Rows(rows.fp8(), rows.scales, *groups, stand_in=data_PD)


class _Start(torch.autograd.Function):
    """Launches; returns a tensor of one element that connects the end to it."""

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, *inputs: Tensor) -> Tensor:
        ctx.exchange = exchange
        exchange.start(*inputs)
        return inputs[0].new_zeros(1)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.exchange.finish_gradient()


class _End(torch.autograd.Function):
    """Waits; its gradient launches what `_Start`'s gradient waits for."""

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, token: Tensor) -> Tensors:
        ctx.exchange = exchange
        return exchange.finish()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        ctx.exchange.start_gradient(*grads)
        return None, grads[0].new_zeros(1)
