"""What the exchange of rows did in a step, per MoE layer, from all ranks.

The numbers travel in the all-reduce of the routers' counts, which every step makes anyway. Each
rank fills its own column of those that are compared between ranks, zero elsewhere: the sum is then
the list of all ranks.

| field, all `moe/layer_i/...` | meaning |
|---|---|
| rows_sent | rows (a token for one expert) that left a rank, mean over ranks |
| rows_received | rows that a rank's experts got, mean over ranks |
| rank_max_over_mean | largest number of rows received over that mean |
| dispatch_mib | sent to other ranks, forward and backward, all ranks, MiB |
| between_nodes_mib | the part of it to ranks of other nodes |
| capacity_use | sync_free: rows of the fullest buffer over its size; above 1 it overflowed |

and `dispatch_redone`, 1 where the step was redone on the exact path. Numbers are of all
microbatches of the step, of both passes where it was redone, and of recomputation.

L MoE layers, E experts, W ranks, X numbers.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.dispatch.gathering import routed_dispatchers
from parallel.ranks import sum_over_ranks

_SUMS = ("rows_sent", "bytes", "bytes_between_nodes")
_COLUMNS = ("rows_received", "fullest")


class DispatchStats:
    """Numbers of the step that begins when this is made."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [dispatcher for _, dispatcher in routed_dispatchers(model)]
        self.capacity = 0
        self.total: Tensor | None = None
        for layer in self.layers:
            layer.planner.traffic.take()  # what validation sent

    def sum_with(self, counts_LE: Tensor) -> Tensor:
        """Sum the routers' counts over ranks, and the numbers of this step with them."""
        if not self.layers:
            return sum_over_ranks(counts_LE)
        both = torch.cat([counts_LE, self._mine(counts_LE)], 1)
        counts_LE, self.total = sum_over_ranks(both).tensor_split([counts_LE.shape[1]], 1)
        return counts_LE

    def fields(self, redone: bool) -> dict[str, float]:
        """The scalars of the step, read from the device; after `sum_with`."""
        if self.total is None:
            return {}
        found = {"dispatch_redone": float(redone)}
        world = dist.get_world_size()
        for i, numbers in enumerate(self.total.tolist()):
            sent, n_bytes, between, *columns = numbers
            received, fullest = columns[:world], columns[world:]
            mean = sum(received) / world
            layer = {
                "rows_sent": sent / world,
                "rows_received": mean,
                "rank_max_over_mean": max(received) / max(mean, 1.0),
                "dispatch_mib": n_bytes / 2**20,
                "between_nodes_mib": between / 2**20,
            }
            if self.capacity:
                layer["capacity_use"] = max(fullest) / self.capacity
            found |= {f"moe/layer_{i}/{name}": value for name, value in layer.items()}
        return found

    def _mine(self, like: Tensor) -> Tensor:
        world, rank = dist.get_world_size(), dist.get_rank()
        mine_LX = like.new_zeros(len(self.layers), len(_SUMS) + len(_COLUMNS) * world)
        for row_X, layer in zip(mine_LX, self.layers, strict=True):
            traffic = layer.planner.traffic.take()
            self.capacity = traffic.capacity
            for i, name in enumerate(_SUMS):
                row_X[i] = getattr(traffic, name)
            for i, name in enumerate(_COLUMNS):
                row_X[len(_SUMS) + i * world + rank] = getattr(traffic, name)
        return mine_LX
