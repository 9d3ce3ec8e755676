"""A guard that raises an error when the host reads a value computed on the device.

It does not check the inside of our own operations (`torch.ops.phalanx`): on a CPU they may read,
and tests marked `gpu` check their device implementations with torch's own guard.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {
    "_local_scalar_dense", "item", "nonzero", "masked_select", "unique_consecutive", "_unique2",
    "bincount", "equal", "is_nonzero", "histc", "_to_cpu", "nonzero_numpy", "unique_dim",
}  # fmt: skip
"""Operations whose result, or its shape, the host must read from the device."""
READS = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
"""Methods of Tensor that read; on a CPU some of them call no operation at all."""


class HostCopy(AssertionError):
    """The host would have waited for the device here."""


_guard = {"on": True}


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = func._schema.name.split("::")[-1], kwargs or {}
        device = kwargs.get("device")
        to_host = name in ("_to_copy", "to") and device is not None
        boolean = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if boolean and name != "index" and args[2].numel() == 1:
            boolean = False  # torch implements it by masked_fill
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if func.namespace == "phalanx":
            with patch.dict(_guard, {"on": False}):
                return func(*args, **kwargs)
        if name in WAITS or to_host or boolean or unsized:
            raise HostCopy(f"{func} reads from the device")
        return func(*args, **kwargs)


@contextmanager
def no_host_copies() -> Iterator[None]:
    """Context in which reading a tensor on the host raises HostCopy; in backward as well, because
    the gradients of CPU tensors are computed in the calling thread."""

    def refuse(name: str) -> Callable[..., Any]:
        shipped = getattr(Tensor, name)

        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not _guard["on"]:
                return shipped(self, *args, **kwargs)
            raise HostCopy(f"Tensor.{name} reads from the device")

        return method

    patches = [patch.object(Tensor, name, refuse(name)) for name in READS]
    for each in patches:
        each.start()
    try:
        with _Mode():
            yield
    finally:
        for each in patches:
            each.stop()
