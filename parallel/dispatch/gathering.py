"""Experts whose width several ranks divide: gathers their tokens first, reduce-scatters the sums.

It wraps any other strategy. The ranks and the communication are described in `parallel.expert`.
"""

from collections.abc import Callable

from torch import Tensor, nn

from models.moe import Dispatcher, ExpertsFn, MoE
from models.step_context import LayerContext
from parallel.dispatch.routed import RoutedDispatcher
from parallel.tensor import TPGroupComm


class GatheringDispatcher:
    """Gathers the tokens of all `etp` ranks for an inner dispatcher and sums its results."""

    def __init__(self, inner: Dispatcher, tp_comm: TPGroupComm) -> None:
        """tp_comm: of the ranks of `etp`."""
        self.inner, self.tp_comm = inner, tp_comm

    def run(
        self,
        x_TD: Tensor,
        expert_ids_TK: Tensor,
        weights_TK: Tensor,
        experts: ExpertsFn,
        shared_experts: Callable[[], Tensor] | None = None,
        layer: LayerContext | None = None,
    ) -> Tensor:
        gather = self.tp_comm.gather
        partial = self.inner.run(
            gather(x_TD), gather(expert_ids_TK), gather(weights_TK), experts, layer=layer
        )
        y_TD = self.tp_comm.reduce_scatter(partial)
        return y_TD if shared_experts is None else y_TD + shared_experts()


def routed_dispatchers(model: nn.Module) -> list[tuple[str, RoutedDispatcher]]:
    """The dispatchers of a model that exchange rows, with the names of their layers."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            dispatcher = module.dispatcher
            if isinstance(dispatcher, GatheringDispatcher):
                dispatcher = dispatcher.inner
            if isinstance(dispatcher, RoutedDispatcher):
                found.append((name, dispatcher))
    return found
