"""Device meshes from resolved degrees.

The same ranks form three meshes, all row-major:

- dense `(dp_replicate, dp_shard, tp)`: weights that the ranks of `tp` divide;
- whole `(dp_replicate, dp_shard_tp)`: undivided weights (norms, router); between the divided layers
  the ranks of `tp` have different tokens, so here they are data ranks;
- expert `(dp_replicate, efsdp, ep, etp)`, with `efsdp * ep * etp = dp_shard * tp`.

The axes with the most communication are innermost: tensor parallelism, then token dispatch stay
within a node if they fit.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from configs.parallel_dims import ParallelDims


@dataclass(frozen=True)
class Mesh:
    """The three meshes of all ranks."""

    parallel_dims: ParallelDims
    dense: DeviceMesh
    whole: DeviceMesh
    expert: DeviceMesh
    device_type: str
    """Device type of the ranks' computation."""

    def fsdp(self, mesh: DeviceMesh, shard: str) -> DeviceMesh:
        """The part of a mesh over which FSDP2 shards (two-dimensional for HSDP)."""
        return mesh["dp_replicate", shard] if self.parallel_dims.dp_replicate > 1 else mesh[shard]


def build(parallel_dims: ParallelDims, device_type: str) -> Mesh:
    """Create the meshes; all `parallel_dims.world` ranks call this together."""
    d = parallel_dims
    return Mesh(
        parallel_dims,
        _mesh(device_type, dp_replicate=d.dp_replicate, dp_shard=d.dp_shard, tp=d.tp),
        _mesh(device_type, dp_replicate=d.dp_replicate, dp_shard_tp=d.dp_shard * d.tp),
        _mesh(device_type, dp_replicate=d.dp_replicate, efsdp=d.efsdp, ep=d.ep, etp=d.etp),
        device_type,
    )


def _mesh(device_type: str, **axes: int) -> DeviceMesh:
    """On CUDA the groups have NCCL alone: the default group has gloo, too, for tensors on the host,
    and would otherwise pass it on to every group, with threads and sockets that none of them
    uses."""
    nccl = device_type == "cuda" and has_nccl()
    backends: Any = dict.fromkeys(axes, NCCL) if nccl else None
    return init_device_mesh(
        device_type, tuple(axes.values()), mesh_dim_names=tuple(axes), backend_override=backends
    )


NCCL = "cuda:nccl"
"""The backend of groups without gloo. Named only `nccl`, torch would divide all backends of the
default group."""


def has_nccl(group: dist.ProcessGroup | None = None) -> bool:
    """Whether a group, by default all ranks, exchanges tensors on CUDA through NCCL. Ranks that do
    not exist have torch's `fake` backend."""
    return "nccl" in dist.get_backend_config(group)
