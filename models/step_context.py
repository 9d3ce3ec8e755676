"""The state of an optimizer step: its inputs to the layers of a model, and the sums they add up.

`train.step` creates one `StepContext` per step and passes `Decoder.forward` a new
`MicrobatchContext` of it; every MoE layer is called with its own `LayerContext`. Without a context
(validation, serving) a layer only computes its output: no counts, no auxiliary losses.

The decision of a microbatch is stored in the `LayerContext`. A recomputed block is called with
the same object again, reads the decision and replays it: it never routes or counts twice.

E experts, K experts per token, T tokens, N sequences, L MoE layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from configs.model import ModelConfig

AUXILIARY_LOSSES = ("sequence_balance", "global_balance", "router_z")
"""Losses of the router (`models.balance`), in the order of every tensor with one value of each."""


@dataclass
class DispatchStats:
    """Rows that one MoE layer sent and received on this rank in a step; zero without
    communication."""

    rows_sent: int | Tensor = 0
    """Rows (a token for one expert) whose expert is on another rank."""
    rows_received: int | Tensor = 0
    """Rows of this rank's experts."""
    bytes: int = 0
    """Bytes to other ranks, forward and backward, without the counts."""
    bytes_between_nodes: int = 0
    """The part of `bytes` to ranks of other nodes."""
    max_rows: int | Tensor = 0
    """Most rows that one rank sent to another in one exchange; recorded if capacity is limited."""
    capacity: int = 0
    """Rows that fit the buffers; 0: any number."""
    rows_without_room: int | Tensor = 0

    def on_device(self, like: Tensor) -> None:
        """Continue counting on the device, if the host does not know the numbers of rows.

        Call it before the first number, not with it: selective recomputation repeats the operations
        of forward, and adding a tensor and an int is another operation than adding two tensors.
        """
        for name in ("rows_sent", "rows_received", "max_rows", "rows_without_room"):
            total = getattr(self, name)
            if not isinstance(total, Tensor):
                setattr(self, name, like.new_full((), total))


@dataclass(frozen=True)
class RoutingDecision:
    """The decision of a router, made once per microbatch, recomputed or not."""

    ids_TK: Tensor
    """The experts of every token."""
    load_E: Tensor | None
    """Choices of all data ranks in this step so far, if the global loss needs them."""
    frequency_NE: Tensor | None
    """f_i of every sequence, if the sequence loss needs them."""


@dataclass
class LayerTotals:
    """Sums over the microbatches of a step, of one MoE layer on this rank."""

    counts_E: Tensor
    """Choices of every expert, int64."""
    losses_3: Tensor
    """Auxiliary losses without coefficients, fp32; added in backward, which runs once."""
    dispatch: DispatchStats = field(default_factory=DispatchStats)

    @staticmethod
    def zeros(n_experts: int, device: torch.device) -> "LayerTotals":
        return LayerTotals(
            torch.zeros(n_experts, dtype=torch.int64, device=device),
            torch.zeros(len(AUXILIARY_LOSSES), device=device),
        )

    def restarted(self) -> "LayerTotals":
        """All sums at zero except those of the exchange, which has already happened."""
        return replace(
            LayerTotals.zeros(len(self.counts_E), self.counts_E.device), dispatch=self.dispatch
        )


@dataclass
class LayerContext:
    """State of one microbatch in one MoE layer."""

    decision: RoutingDecision | None = None
    """Recorded by the first pass; later passes replay it."""
    step: "StepContext | None" = None
    """None: the choice is recorded or replayed, and nothing is counted."""
    totals: LayerTotals | None = None
    """Sums of the step, if there is one."""


@dataclass(frozen=True)
class MicrobatchContext:
    """State of one forward pass of a step, and of its recomputation."""

    layers: tuple[LayerContext | None, ...]
    """As in `StepContext`."""

    @staticmethod
    def recording(model: ModelConfig) -> "MicrobatchContext":
        """Context of a pass outside training: it records the routers' decisions, and a second pass
        with the same context replays them, with weights from its own scores (routing replay)."""
        indices = [*range(model.n_layers), *[model.n_layers - 1] * model.mtp_depth]
        layers = (LayerContext() if model.is_moe(index) else None for index in indices)
        return MicrobatchContext(tuple(layers))

    @staticmethod
    def replaying(model: ModelConfig, ids_LTK: Tensor) -> "MicrobatchContext":
        """Context of a pass that uses the choice of another one, such as a server's: routing
        weights are computed from its own scores, so gradients reach the router.

        ids_LTK: integers, for the MoE layers of the main stack; MTP modules choose for themselves.
        Raises ValueError if these cannot be the model's choice.
        """
        moe = model.moe
        context = MicrobatchContext.recording(model)
        main = [layer for layer in context.layers[: model.n_layers] if layer is not None]
        if ids_LTK.ndim != 3 or ids_LTK.shape[0] != len(main) or ids_LTK.shape[2] != moe.top_k:
            raise ValueError(
                f"routed experts of shape {tuple(ids_LTK.shape)}: the model has {len(main)} MoE "
                f"layers and {moe.top_k} experts per token"
            )
        ids_LTK = ids_LTK.long()
        if ids_LTK.numel() and not 0 <= int(ids_LTK.min()) <= int(ids_LTK.max()) < moe.n_experts:
            raise ValueError(f"routed experts must lie between 0 and {moe.n_experts - 1}")
        for layer, ids_TK in zip(main, ids_LTK, strict=True):
            layer.decision = RoutingDecision(ids_TK, None, None)
        return context

    def routed_experts(self) -> Tensor:
        """int64 `[L, T, K]`: the decisions of the layers that ran with this context, MTP modules
        last."""
        return torch.stack([
            layer.decision.ids_TK
            for layer in self.layers
            if layer is not None and layer.decision is not None
        ])  # fmt: skip


@dataclass(frozen=True)
class StepContext:
    """State of one optimizer step, with its sums per MoE layer."""

    seq_len: int
    """Tokens per sequence."""
    tokens: Tensor
    """Tokens of the whole step, over all data ranks and microbatches: one number, on the device."""
    reduce_counts: Callable[[Tensor], Tensor]
    """Sums a tensor over all data ranks, in place."""
    layers: tuple[LayerTotals | None, ...]
    """For every block, those of MTP modules last; None for blocks without experts."""
    exact_dispatch: bool = False
    """Dispatchers use an exchange without a capacity limit."""

    @staticmethod
    def begin(
        moe_blocks: Sequence[bool],
        n_experts: int,
        seq_len: int,
        tokens: Tensor,
        reduce_counts: Callable[[Tensor], Tensor],
    ) -> "StepContext":
        """A step with all sums at zero, on the device of `tokens`; see the fields.

        Args:
            moe_blocks: For every block whether it has experts (`Decoder.moe_blocks`).
            n_experts: Experts per layer.
            seq_len, tokens, reduce_counts: The fields of the class.
        """
        layers = (
            LayerTotals.zeros(n_experts, tokens.device) if is_moe else None for is_moe in moe_blocks
        )
        return StepContext(seq_len, tokens, reduce_counts, tuple(layers))

    @property
    def moe_layers(self) -> list[LayerTotals]:
        """The sums of the layers with experts, first layer first."""
        return [totals for totals in self.layers if totals is not None]

    def microbatch(self) -> MicrobatchContext:
        """The context for the next forward pass."""
        return MicrobatchContext(
            tuple(
                None if totals is None else LayerContext(step=self, totals=totals)
                for totals in self.layers
            )
        )

    def redo_exactly(self) -> "StepContext":
        """Restart the step with exact dispatch; communication so far stays counted."""
        layers = (None if totals is None else totals.restarted() for totals in self.layers)
        return replace(self, layers=tuple(layers), exact_dispatch=True)
