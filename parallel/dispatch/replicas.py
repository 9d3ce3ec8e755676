"""For inference with more ranks of `ep` than of `tp`: groups of `tp` ranks compute the same tokens.

If all of them sent these to the experts, the experts would compute them once per group. So each
group sends another share of the tokens, and all groups gather the results. Communication per rank
and layer: that of the inner dispatcher for its share, and a gather of T * D in the compute dtype,
for T tokens of a rank.
"""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from models.moe import Dispatcher, ExpertsFn
from models.step_context import LayerContext
from parallel.tensor import TPGroupComm


class ReplicaDispatcher:
    """Gives an inner dispatcher this replica's share of the tokens. Without autograd."""

    def __init__(self, inner: Dispatcher, group: dist.ProcessGroup) -> None:
        """group: the ranks that have the same tokens."""
        self.inner, self.comm, self.n = inner, TPGroupComm(group), group.size()

    def run(
        self,
        x_TD: Tensor,
        expert_ids_TK: Tensor,
        weights_TK: Tensor,
        experts: ExpertsFn,
        shared_experts: Callable[[], Tensor] | None = None,
        layer: LayerContext | None = None,
    ) -> Tensor:
        """The number of tokens must be a multiple of the number of replicas."""
        x_tD, ids_tK, weights_tK = (
            each.chunk(self.n)[self.comm.place] for each in (x_TD, expert_ids_TK, weights_TK)
        )
        y_TD = self.comm.gather(self.inner.run(x_tD, ids_tK, weights_tK, experts, layer=layer))
        return y_TD if shared_experts is None else y_TD + shared_experts()
