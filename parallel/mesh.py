"""Device meshes from resolved degrees.

The same ranks carry two meshes, both row-major: dense `(dp_replicate, dp_shard)` and expert
`(dp_replicate, efsdp, ep)`. Expert ranks are neighbours, so that the busiest exchange (token
dispatch) stays within a node as long as `ep` does.
"""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from configs.degrees import Degrees


@dataclass(frozen=True)
class Mesh:
    """The two views of all ranks."""

    degrees: Degrees
    dense: DeviceMesh
    expert: DeviceMesh

    def fsdp_dense(self) -> DeviceMesh:
        """The mesh over which FSDP2 shards dense parameters (two-dimensional for HSDP)."""
        return self._fsdp(self.dense, "dp_shard")

    def fsdp_expert(self) -> DeviceMesh:
        """The mesh over which FSDP2 shards the experts of one expert-parallel rank."""
        return self._fsdp(self.expert, "efsdp")

    def _fsdp(self, mesh: DeviceMesh, shard: str) -> DeviceMesh:
        return mesh["dp_replicate", shard] if self.degrees.dp_replicate > 1 else mesh[shard]


def build(degrees: Degrees, device_type: str) -> Mesh:
    """Make the meshes; all ranks call this together, `degrees.world` of them."""
    dense = init_device_mesh(
        device_type,
        (degrees.dp_replicate, degrees.dp_shard),
        mesh_dim_names=("dp_replicate", "dp_shard"),
    )
    expert = init_device_mesh(
        device_type,
        (degrees.dp_replicate, degrees.efsdp, degrees.ep),
        mesh_dim_names=("dp_replicate", "efsdp", "ep"),
    )
    return Mesh(degrees, dense, expert)
