"""Where the rows of a batch go: the contract of a dispatch strategy.

A *plan* is a linear map A from tokens to the rows of this rank's experts, which copies and sends,
and its transpose, which sends back and sums. Dispatch is A, its gradient the transpose; combine is
the transpose, its gradient A. So a strategy writes down two exchanges without thinking of autograd
(that is `parallel.dispatch.routed`), and the gradients are right if the two are transposes.

T tokens, K experts per token, P slots of rows, D width, e local experts.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from configs.dispatch import DispatchConfig
from models.step_context import DispatchStats
from parallel.dispatch.packed_rows import PackedRows, WireFormat


class CombinedRows(NamedTuple):
    """What the transpose of a plan gives."""

    y_TD: Tensor
    weights_TK: Tensor | None
    """Sums of what `weights_P` held, where it was given."""


class DispatchPlan(Protocol):
    """Where the rows of one batch go. Each map begins in its first half, which gives a handle of
    what is on its way, and ends in its second, which waits for it."""

    ends_e: Tensor
    counts_e: Tensor

    def start_dispatch(self, x_TD: Tensor, weights_TK: Tensor | None, wire: WireFormat) -> Any:
        """Send each token to its experts, with its routing weights."""
        ...

    def finish_dispatch(self, handle: Any) -> PackedRows:
        """Rows in the order of experts; their weights `[P, 1]` are `extra`."""
        ...

    def start_combine(self, rows_PD: Tensor, weights_P: Tensor | None, wire: WireFormat) -> Any:
        """Send the rows back to their tokens."""
        ...

    def finish_combine(self, handle: Any, dtype: torch.dtype) -> CombinedRows:
        """The sum of each token's rows, in `dtype`."""
        ...


class Planner(Protocol):
    """A strategy: turns choices of experts into plans, over the ranks it was made for."""

    @property
    def align(self) -> int:
        """What an expert's rows start at a multiple of."""
        ...

    def plan(
        self, ids: list[Tensor], stats: DispatchStats, exact: bool = False
    ) -> list[DispatchPlan]:
        """The plans of several batches of choices `[T, K]`; all ranks call it together.

        stats: where they count what travels. exact: there must be room for all rows.
        """
        ...


@dataclass(frozen=True)
class WireFormats:
    """The wire format of every kind of rows."""

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
