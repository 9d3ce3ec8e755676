"""A routed exchange, differentiable and in two halves, and the dispatcher made of it.

Where the rows of a batch go is a *route*: a linear map A from tokens to the rows of this rank's
experts, which copies and sends, and its transpose, which sends back and sums. Dispatch is A, its
gradient the transpose; combine is the transpose, its gradient A. So a strategy writes down two
exchanges without thinking of autograd, and the gradients are right if the two are transposes.

Every exchange has a start and an end, and each is a node of the graph: forward launches in the
first and waits in the second, backward launches in the second's gradient and waits in the first's.
Autograd runs nodes in the opposite order of their creation. Whatever lay between the two in
forward (experts of another chunk, shared experts) therefore lies between them in backward: overlap
in backward comes for nothing.

What is exact: with the wire "compute" everything, up to the order of sums. FP8 rounds the rows
that it carries; the gradient takes that rounding for the identity (straight through), and gradients
that travel as FP8 are rounded likewise. Routing weights and their gradients are fp32 always.

T tokens, K experts per token, P slots of rows, D width, e local experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from configs.dispatch import DispatchConfig
from models.moe import ExpertsFn, Rows
from parallel.dispatch.packed_rows import DispatchCounters, PackedRows, WireFormat

Tensors = tuple[Tensor | None, ...]


class CombinedRows(NamedTuple):
    """What the transpose of a route gives."""

    y_TD: Tensor
    weights_TK: Tensor | None
    """Sums of what `weights_P` held, where it was given."""


class DispatchPlan(Protocol):
    """Where the rows of one batch go. Both maps begin at once; the result waits for the end."""

    ends_e: Tensor
    counts_e: Tensor

    def to_experts(
        self, x_TD: Tensor, weights_TK: Tensor | None, wire: WireFormat
    ) -> Callable[[], PackedRows]:
        """Rows in the order of experts; their weights `[P, 1]` are the parcel's `extra`."""
        ...

    def to_tokens(
        self, rows_PD: Tensor, weights_P: Tensor | None, wire: WireFormat
    ) -> Callable[[], CombinedRows]:
        """The sum of each token's rows."""
        ...


class Planner(Protocol):
    """A strategy: it knows the ranks and turns choices of experts into routes."""

    traffic: DispatchCounters
    align: int
    """What an expert's rows start at a multiple of."""

    def plan(self, ids: list[Tensor]) -> list[DispatchPlan]:
        """The routes of several batches of choices `[T, K]`; all ranks call it together."""
        ...


@dataclass(frozen=True)
class WireFormats:
    """What every kind of rows travels as."""

    dispatch: WireFormat
    dispatch_grad: WireFormat
    combine: WireFormat
    combine_grad: WireFormat

    @staticmethod
    def of(options: DispatchConfig, power_of_two: bool) -> "WireFormats":
        fp8: WireFormat = "fp8_power_of_two" if power_of_two else "fp8"
        dtypes = (
            options.dispatch_dtype, options.dispatch_grad_dtype, options.combine_dtype,
            options.combine_grad_dtype,
        )  # fmt: skip
        return WireFormats(*(fp8 if dtype == "fp8" else "compute" for dtype in dtypes))


class RoutedDispatcher:
    """`models.moe.Dispatcher` over routes, a chunk of tokens after another."""

    def __init__(
        self, planner: Planner, options: DispatchConfig, power_of_two: bool = False
    ) -> None:
        """power_of_two: of the scales of rows that travel in FP8."""
        self.planner, self.options = planner, options
        self.wires = WireFormats.of(options, power_of_two)

    @torch.compiler.disable  # splits are read on the host, and every layer's closures are others
    def run(
        self,
        x_TD: Tensor,
        expert_ids_TK: Tensor,
        weights_TK: Tensor,
        experts: ExpertsFn,
        shared_experts: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        n = self.options.chunks  # the same on all ranks, however many tokens each has
        sizes = [len(x_TD) // n + (i < len(x_TD) % n) for i in range(n)]
        x, weights = x_TD.split(sizes), weights_TK.split(sizes)
        routes = self.planner.plan(list(expert_ids_TK.split(sizes)))

        def send(i: int) -> Callable[[], Rows]:
            return _to_experts(routes[i], self.wires, x[i], weights[i], self.planner.align)

        arriving, returning = [send(0)], []
        shared_TD = None
        for i in range(n):
            if i + 1 < n:
                arriving.append(send(i + 1))
            if i == 0 and shared_experts is not None:
                shared_TD = shared_experts()
            returning.append(_to_tokens(routes[i], self.wires, experts(arriving[i]())))
        done = [returned() for returned in returning]
        y_TD = done[0] if n == 1 else torch.cat(done)
        return y_TD if shared_TD is None else y_TD + shared_TD


def _to_experts(
    route: DispatchPlan, wires: WireFormats, x_TD: Tensor, weights_TK: Tensor, align: int
) -> Callable[[], Rows]:
    """Send tokens to experts; the result waits for the rows that came."""
    arrived: list[PackedRows] = []

    def start(x_TD: Tensor, weights_TK: Tensor) -> Callable[[], Tensors]:
        arrive = route.to_experts(x_TD, weights_TK, wires.dispatch)

        def end() -> Tensors:
            parcel = arrive()
            arrived.append(parcel)
            assert parcel.extra is not None
            if parcel.scales is None:
                return parcel.data, parcel.extra[:, 0]
            return x_TD.new_zeros(1).expand(parcel.data.shape), parcel.extra[:, 0]

        return end

    def start_gradient(grad_PD: Tensor, grad_P: Tensor) -> Callable[[], Tensors]:
        return route.to_tokens(grad_PD, grad_P[:, None], wires.dispatch_grad)

    trip = _Trip(start, start_gradient)
    link = _Start.apply(trip, x_TD, weights_TK)

    def rows() -> Rows:
        data_PD, weights_P = _End.apply(trip, link)
        parcel = arrived.pop()
        if parcel.scales is None:
            return Rows(data_PD, None, weights_P, route.ends_e, route.counts_e, align)
        groups = weights_P, route.ends_e, route.counts_e, align
        return Rows(parcel.fp8(), parcel.scales, *groups, stand_in=data_PD)

    return rows


def _to_tokens(route: DispatchPlan, wires: WireFormats, rows_PD: Tensor) -> Callable[[], Tensor]:
    """Send expert outputs back; the result waits for the sum of each token's."""

    def start(rows_PD: Tensor) -> Callable[[], Tensors]:
        arrive = route.to_tokens(rows_PD, None, wires.combine)
        return lambda: (arrive().y_TD,)

    def start_gradient(grad_TD: Tensor) -> Callable[[], Tensors]:
        arrive = route.to_experts(grad_TD, None, wires.combine_grad)
        return lambda: (arrive().values(grad_TD.dtype),)

    trip = _Trip(start, start_gradient)
    link = _Start.apply(trip, rows_PD)
    return lambda: _End.apply(trip, link)[0]


@dataclass
class _Trip:
    """A started exchange and its gradient's, between their two halves.

    The graph holds it, so it must not hold tensors of the graph: that circle would never be freed.
    """

    start: Callable[..., Callable[[], Tensors]]
    start_gradient: Callable[..., Callable[[], Tensors]]
    running: list[Callable[[], Tensors]] = field(default_factory=list)


class _Start(torch.autograd.Function):
    """Launches; gives a token of one element that ties the end to it."""

    @staticmethod
    def forward(ctx: Any, trip: _Trip, *inputs: Tensor) -> Tensor:
        ctx.trip = trip
        trip.running.append(trip.start(*inputs))
        return inputs[0].new_zeros(1)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.trip.running.pop()()


class _End(torch.autograd.Function):
    """Waits; its gradient launches what `_Start`'s gradient waits for."""

    @staticmethod
    def forward(ctx: Any, trip: _Trip, link: Tensor) -> Tensors:
        ctx.trip = trip
        return trip.running.pop()()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        ctx.trip.running.append(ctx.trip.start_gradient(*grads))
        return None, grads[0].new_zeros(1)
