"""The interface of a dispatch strategy.

A *plan* is a linear map A from tokens to the rows of this rank's experts, which copies and sends
rows, and its transpose, which returns and sums them. Dispatch is A, its gradient the transpose;
combine is the transpose, its gradient A. So a strategy implements two exchanges without autograd
(that is `parallel.dispatch.routed`), and the gradients are correct if the two are transposes.

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
    """Result of the transpose of a plan."""

    y_TD: Tensor
    weights_TK: Tensor | None
    """Sums of `weights_P`, if it was passed."""


class DispatchPlan(Protocol):
    """Communication of the rows of one batch. The first half of each map starts it and returns a
    handle; the second half waits for it."""

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
    """A strategy: converts choices of experts to plans, for the ranks it was created for."""

    @property
    def align(self) -> int:
        """An expert's rows start at a multiple of this."""
        ...

    def plan(
        self, ids: list[Tensor], stats: DispatchStats, exact: bool = False
    ) -> list[DispatchPlan]:
        """The plans of several batches of choices `[T, K]`; all ranks call it together.

        stats: counts the communication. exact: all rows must fit.
        """
        ...


@dataclass(frozen=True)
class WireFormats:
    """The format in which every type of rows is sent."""

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
