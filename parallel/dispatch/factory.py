"""Creates the dispatchers of a model's MoE layers from `[parallel.dispatch]` and a process
group."""

import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from configs.dispatch import DispatchConfig
from configs.errors import ConfigError
from models.moe import Dispatcher
from parallel.dispatch.all_to_all import AllToAll
from parallel.dispatch.deepep import DeepEP
from parallel.dispatch.hierarchical import Hierarchical
from parallel.dispatch.packed_rows import RowAllToAll
from parallel.dispatch.plan import Planner
from parallel.dispatch.routed import RoutedDispatcher
from parallel.dispatch.sync_free import SyncFree
from parallel.mesh import NCCL, has_nccl


def dispatcher_maker(
    n_experts: int, group: dist.ProcessGroup, options: DispatchConfig, align: int = 1,
    power_of_two: bool = False,
) -> Callable[[], Dispatcher]:  # fmt: skip
    """A function that creates one layer's dispatcher; layers share process groups and buffers.

    All ranks of `group` call it together.

    Args:
        n_experts: Number of experts.
        group: The ranks that divide the experts.
        options: The settings.
        align: An expert's rows start at a multiple of this.
        power_of_two: Round the scales of rows sent in FP8 up to powers of two.
    """
    nodes = node_of_ranks(group, options.node_size)
    me = dist.get_rank(group)
    crosses = [node != nodes[me] for node in nodes]
    groups = _groups_of_levels(group, nodes) if options.kind == "hierarchical" else None
    buffers: dict[str, Any] = {}

    def planner() -> Planner:
        if groups is not None:
            across, within = groups
            m = nodes.count(nodes[me])
            far = [node != me // m for node in range(len(nodes) // m)]
            return Hierarchical(
                n_experts,
                group,
                RowAllToAll(across, far),
                RowAllToAll(within, [False] * m),
                align,
            )
        if options.kind == "deepep":
            return DeepEP(n_experts, group, buffers, align)
        comm = RowAllToAll(group, crosses)
        if options.kind == "sync_free":
            return SyncFree(n_experts, comm, options.capacity_factor, align)
        return AllToAll(n_experts, comm, align)

    return lambda: RoutedDispatcher(planner(), options, power_of_two)


def node_of_ranks(group: dist.ProcessGroup, node_size: int) -> list[int]:
    """The node index of every rank of a group.

    node_size: ranks of the group per node; 0: ranks on the same host, by torchrun's numbering.
    """
    ranks = dist.get_process_group_ranks(group)
    if node_size:
        return [place // node_size for place in range(len(ranks))]
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return [rank // per_host for rank in ranks]


def _groups_of_levels(
    group: dist.ProcessGroup, nodes: list[int]
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The ranks with this rank's index on every node, and the ranks of this rank's node."""
    ranks, me = dist.get_process_group_ranks(group), dist.get_rank(group)
    m = nodes.count(nodes[0])
    if nodes != [node for node in nodes[::m] for _ in range(m)] or len(nodes) == m:
        kinds = " + ".join(str(nodes.count(node)) for node in dict.fromkeys(nodes))
        raise ConfigError(
            f'parallel.dispatch.kind = "hierarchical": the {len(ranks)} ranks of parallel.ep lie '
            f"on nodes as {kinds}; it needs several nodes of the same size: set "
            'parallel.dispatch.node_size, or use "all_to_all"'
        )
    node, place = divmod(me, m)
    backend = NCCL if has_nccl(group) else None
    across = dist.new_group(ranks[place::m], backend=backend, use_local_synchronization=True)
    within = dist.new_group(
        ranks[node * m : (node + 1) * m], backend=backend, use_local_synchronization=True
    )
    assert across is not None and within is not None
    return across, within
