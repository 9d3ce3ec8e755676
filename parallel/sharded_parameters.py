"""Divided parameters: logical to everyone, local to the module that computes with them.

A parameter that several ranks divide is a DTensor, so that names and shapes stay logical for
checkpoints, clipping and initialisation. The model's code knows nothing of that: reading the
attribute gives the plain local tensor, with a gradient back into the DTensor. It is done with
properties on a subclass of the module's class, so that parameters, hooks and FSDP2 stay as they
are. (While FSDP2 holds a shard of it, which nothing computes with, the attribute is that shard.)
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement


def shard_parameters(
    module: nn.Module,
    mesh: DeviceMesh,
    dims: Mapping[str, tuple[int, ...]],
    base: type[nn.Module] | None = None,
) -> None:
    """Shard parameters of a module on the meta device.

    dims: for each parameter the dimension that each axis of `mesh` divides.
    base: the class the module becomes, by default the one it is.
    """
    for name, axes in dims.items():
        parameter = module._parameters[name]
        assert parameter is not None and parameter.is_meta, "divided before it is materialised"
        local = parameter.detach()
        placements: list[Placement] = []
        for size, dim in zip(mesh.shape, axes, strict=True):
            assert local.shape[dim] % size == 0, f"{name}: {tuple(local.shape)} over {mesh}"
            local = local.chunk(size, dim)[0]
            placements.append(Shard(dim))
        shard = DTensor.from_local(local.contiguous(), mesh, placements, run_check=False)
        module._parameters[name] = nn.Parameter(shard)
    properties = {name: _local(name, mesh, lambda local: local) for name in dims}
    base = base or type(module)
    module.__class__ = type(f"Divided{base.__name__}", (base,), properties)


def pad_local(module: nn.Module, name: str, dim: int, mesh: DeviceMesh) -> None:
    """Let the module read its slice of parameter `name` with zeros around it, in full length.

    For a bias that is added before a sum over the ranks of `mesh`, which then counts it once.
    """
    parameter = module._parameters[name]
    assert isinstance(parameter, DTensor)
    width = parameter.to_local().shape[dim]
    before = mesh.get_local_rank() * width
    after = parameter.shape[dim] - before - width
    sides = [0, 0] * (parameter.ndim - 1 - dim % parameter.ndim) + [before, after]
    setattr(
        type(module), name, _local(name, parameter.device_mesh, lambda local: F.pad(local, sides))
    )


def _local(name: str, mesh: DeviceMesh, form: Callable[[Tensor], Tensor]) -> property:
    def read(module: nn.Module) -> Any:
        parameter = module._parameters[name]
        if isinstance(parameter, DTensor) and parameter.device_mesh == mesh:
            return form(parameter.to_local())
        return parameter

    return property(read)
