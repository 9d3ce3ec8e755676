"""Memory of the tensors that operations create."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Context that counts the bytes of storages created and not yet freed; `peak` is the
    maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def _free(self, key: int, n_bytes: int) -> None:
        self._known.discard(key)
        self.now -= n_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, n_bytes = storage._cdata, storage.nbytes()
                if key not in self._known and key not in before:
                    self._known.add(key)
                    self.now += n_bytes
                    weakref.finalize(storage, self._free, key, n_bytes)
        self.peak = max(self.peak, self.now)
        return out
