"""Parameters that several ranks divide: DTensors to everyone, a local tensor to their module.

Initialization, clipping, checkpoints and FSDP2 see the whole, by its logical name and shape. The
module that computes with it sees this rank's part, with a gradient back into the DTensor
(`models.layers.local_view`). While FSDP2 has sharded the parameter further, nothing computes with
it.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement

from models.layers.local_view import LocalViews


def shard_parameters(
    module: LocalViews, mesh: DeviceMesh, dims: Mapping[str, tuple[int, ...]]
) -> None:
    """Shard parameters of a module on the meta device.

    dims: for each parameter the dimension that each axis of `mesh` divides.
    """
    for name, axes in dims.items():
        parameter = module._parameters[name]
        assert parameter is not None and parameter.is_meta, "divided before it is materialized"
        local = parameter.detach()
        placements: list[Placement] = []
        for size, dim in zip(mesh.shape, axes, strict=True):
            assert local.shape[dim] % size == 0, f"{name}: {tuple(local.shape)} over {mesh}"
            local = local.chunk(size, dim)[0]
            placements.append(Shard(dim))
        shard = DTensor.from_local(local.contiguous(), mesh, placements, run_check=False)
        module.register_parameter(name, nn.Parameter(shard))
        module.set_local_view(name, LocalPart(mesh))


def pad_local(module: LocalViews, name: str, dim: int, mesh: DeviceMesh) -> None:
    """Let the module read its slice of parameter `name` with zeros around it, in full length.

    For a bias that is added before a sum over the ranks of `mesh`, which then counts it once.
    """
    parameter = module._parameters[name]
    assert isinstance(parameter, DTensor)
    width = parameter.to_local().shape[dim]
    before = mesh.get_local_rank() * width
    after = parameter.shape[dim] - before - width
    sides = (*[0, 0] * (parameter.ndim - 1 - dim % parameter.ndim), before, after)
    module.set_local_view(name, LocalPart(parameter.device_mesh, sides))


class LocalPart:
    """The view of a parameter that is sharded over `mesh`."""

    def __init__(self, mesh: DeviceMesh, padding: tuple[int, ...] = ()) -> None:
        """padding: zeros around this rank's part, as `torch.nn.functional.pad` takes them."""
        self.mesh, self.padding = mesh, padding

    def __call__(self, parameter: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor) or parameter.device_mesh != self.mesh:
            return parameter  # FSDP2 has sharded it further, or it was loaded as a whole
        local = parameter.to_local()
        return F.pad(local, self.padding) if self.padding else local
