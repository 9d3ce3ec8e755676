"""Parameters that several ranks divide: a DTensor for other code, a local tensor for their module.

Initialization, clipping, checkpoints and FSDP2 use the whole parameter, by its logical name and
shape. The module that computes with it reads this rank's part, with a gradient to the DTensor
(`models.layers.local_view`). While FSDP2 has sharded the parameter further, no module computes with
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
    """Make the module read its slice of parameter `name` padded with zeros to full length.

    This is for a bias that is added before a sum over the ranks of `mesh`, which then counts it
    once.
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
        """padding: zeros around this rank's part, in the format of `torch.nn.functional.pad`."""
        self.mesh, self.padding = mesh, padding

    def __call__(self, parameter: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor) or parameter.device_mesh != self.mesh:
            return parameter  # FSDP2 has sharded it further, or it was loaded as a whole
        local = parameter.to_local()
        return F.pad(local, self.padding) if self.padding else local
