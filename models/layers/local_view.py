"""Access to sharded parameters: a module reads `self.w13` and gets the tensor to compute with.

A parameter that is divided among ranks is registered as a whole (a DTensor), so that names and
shapes stay logical for checkpoints, clipping and initialization. The module computes with this
rank's part. `parallel.sharded_parameters` sets a view for every such parameter; without a view the
registered parameter is read.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

View = Callable[[Tensor], Tensor]


class LocalViews(nn.Module):
    """A module whose parameters may be sharded; each is declared as `name = local_view("name")`."""

    local_views: Mapping[str, View] = MappingProxyType({})
    """Views by name of the parameter."""

    def set_local_view(self, name: str, view: View) -> None:
        """Make the module compute with `view(parameter)`."""
        self.local_views = {**self.local_views, name: view}


def local_view(name: str) -> Any:
    """An attribute that reads parameter `name` through its view, if it has one."""

    def read(module: LocalViews) -> Any:
        if name not in module._parameters:
            raise AttributeError(name)  # not registered yet
        parameter = module._parameters[name]
        view = module.local_views.get(name)
        return parameter if view is None or parameter is None else view(parameter)

    return property(read)
