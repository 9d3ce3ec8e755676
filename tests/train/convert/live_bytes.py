"""Measures the memory of tensors."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """The largest number of bytes that tensors created by operations occupied at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        makes = all(out.alias_info is None for out in func._schema.returns)  # not a view of another
        if makes and isinstance(result, Tensor) and result.device.type == "cpu":
            self._see(result.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        place, n = storage.data_ptr(), storage.nbytes()
        if not n or place in self.known:
            return
        self.known.add(place)
        self.now += n
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, place, n)

    def _forget(self, place: int, n: int) -> None:
        self.known.discard(place)
        self.now -= n
