"""Statistics of the row exchange in a step, per MoE layer, from all ranks.

The numbers are part of the all-reduce of the routers' counts, which every step performs anyway. For
numbers that are compared between ranks, each rank fills its own column and zero elsewhere: the sum
is then the list of all ranks.

| field, all `moe/layer_i/...` | meaning |
|---|---|
| rows_sent | rows (a token for one expert) sent by a rank to others, mean over ranks |
| rows_received | rows received by a rank's experts, mean over ranks |
| rank_max_over_mean | largest number of rows received over that mean |
| dispatch_mib | sent to other ranks, forward and backward, all ranks, MiB |
| between_nodes_mib | the part of it to ranks of other nodes |
| capacity_use | sync_free: rows of the fullest buffer over its size; above 1 it overflowed |

and `dispatch_redone`, 1 if the step was repeated with exact dispatch. Numbers are of all
microbatches of the step, of both passes if it was repeated, and of recomputation.

L MoE layers, E experts, W ranks, X numbers.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from models.step_context import DispatchStats, StepContext
from parallel.ranks import sum_over_ranks

_SUMS = ("rows_sent", "bytes", "bytes_between_nodes")
_COLUMNS = ("rows_received", "max_rows")


def sum_counts(step: StepContext, rows_travel: bool) -> tuple[Tensor, Tensor | None]:
    """Sum over all ranks: the choices of experts `[L, E]`, and the numbers of the exchange.

    rows_travel: whether the model's dispatchers exchange rows; otherwise there are no numbers.
    """
    layers = step.moe_layers
    if not layers:
        return torch.zeros(0, 1, dtype=torch.int64), None
    counts_LE = torch.stack([totals.counts_E for totals in layers])
    if not rows_travel:
        return sum_over_ranks(counts_LE), None
    own_LX = torch.stack([_own(totals.dispatch, counts_LE) for totals in layers])
    both = sum_over_ranks(torch.cat([counts_LE, own_LX], 1))
    counts_LE, numbers_LX = both.tensor_split([counts_LE.shape[1]], 1)
    return counts_LE, numbers_LX


def _own(stats: DispatchStats, like: Tensor) -> Tensor:
    """This rank's numbers of a layer; numbers that are compared between ranks are in its column."""
    world, rank = dist.get_world_size(), dist.get_rank()
    own_X = like.new_zeros(len(_SUMS) + len(_COLUMNS) * world)
    for i, name in enumerate(_SUMS):
        own_X[i] = getattr(stats, name)
    for i, name in enumerate(_COLUMNS):
        own_X[len(_SUMS) + i * world + rank] = getattr(stats, name)
    return own_X


def dispatch_fields(step: StepContext, numbers_LX: Tensor | None) -> dict[str, float]:
    """The scalars of the step, read from the device. numbers_LX: from `sum_counts`."""
    if numbers_LX is None:
        return {}
    found = {"dispatch_redone": float(step.exact_dispatch)}
    world = dist.get_world_size()
    for i, (numbers, totals) in enumerate(zip(numbers_LX.tolist(), step.moe_layers, strict=True)):
        sent, n_bytes, between, *columns = numbers
        received, max_rows = columns[:world], columns[world:]
        mean = sum(received) / world
        layer = {
            "rows_sent": sent / world,
            "rows_received": mean,
            "rank_max_over_mean": max(received) / max(mean, 1.0),
            "dispatch_mib": n_bytes / 2**20,
            "between_nodes_mib": between / 2**20,
        }
        if totals.dispatch.capacity:
            layer["capacity_use"] = max(max_rows) / totals.dispatch.capacity
        found |= {f"moe/layer_{i}/{name}": value for name, value in layer.items()}
    return found
