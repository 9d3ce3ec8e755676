"""A mode that counts the bytes that tensors hold, by category, while code runs on tensors without
data.

What a step keeps and needs for the moment is decided by its code, by autograd, FSDP2 and
recomputation. That code itself runs, on tensors that have shape, dtype, strides and a storage that
is counted, but no data: operations on floating-point tensors are carried out on torch's meta
device. Integers have data as long as they are small, since the host reads some of them: how many
rows an expert gets. So a block of a 671B model runs in a fraction of a second and in no memory.

A storage is counted from the first tensor on it until the last one, or autograd, lets go of it:
what an allocator is asked for, without what it adds, and without temporaries inside a single
operation of torch. (Torch's `MemTracker` counts the same of real tensors.)
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.memory.collectives import COLLECTIVES, REDUCE_SCATTER, WAIT

DEVICES = {"cpu": torch.device("cpu"), "cuda": torch.device("meta")}
"""Where traced tensors say that they are: `meta` is where code takes the path of an accelerator
without launching a kernel."""
_LARGEST_REAL = 2**24
"""Elements up to which tensors of integers have data."""
_WITH_DATA = (torch.int64, torch.int32, torch.bool)
"""Not bytes: FP8 travels as such."""


class Event(NamedTuple):
    """Bytes that begin or cease to be held."""

    category: str
    n_bytes: int
    layer: int | None
    """Within which layer the storage was allocated; None: outside all."""


Mark = tuple[str, int | None]
"""What begins, and in which layer; None: outside all."""


class Segment:
    """What happens between two marks."""

    def __init__(self, mark: Mark) -> None:
        self.mark = mark
        self.events: list[Event] = []
        self.exchanged: Counter[str] = Counter()
        """Bytes by axis of the mesh and kind of collective."""


class Storage:
    """What is counted of a storage, and the methods of `torch.UntypedStorage` that FSDP2 uses."""

    def __init__(self, tracker: "MemoryTracker", n_bytes: int) -> None:
        self.tracker, self.n_bytes = tracker, n_bytes
        self.category, self.layer = tracker.categories[-1], tracker.layer
        self._add(n_bytes)

    def size(self) -> int:
        return self.n_bytes

    def resize_(self, n_bytes: int) -> None:
        self._add(n_bytes - self.n_bytes)
        self.n_bytes = n_bytes

    def recategorize(self, category: str) -> None:
        self._add(-self.n_bytes)
        self.category = category
        self._add(self.n_bytes)

    def __del__(self) -> None:
        self._add(-self.n_bytes)

    def _add(self, n_bytes: int) -> None:
        self.tracker.segments[-1].events.append(Event(self.category, n_bytes, self.layer))


class Traced(Tensor):
    """A tensor of a `MemoryTracker`."""

    content: Tensor
    """On the meta device; integers on the CPU where they have data."""
    storage_: Storage
    is_meta = False
    """Else FSDP2 would take parameters for not materialised."""

    @staticmethod
    def __new__(cls, content: Tensor, device: torch.device, storage: Storage) -> "Traced":
        traced: Traced = Tensor._make_wrapper_subclass(
            cls, content.shape, strides=content.stride(), storage_offset=content.storage_offset(),
            dtype=content.dtype, device=device,
        )  # fmt: skip
        traced.content, traced.storage_ = content, storage
        return traced

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def untyped_storage(self) -> Any:
        return self.storage_

    def tolist(self) -> Any:
        """Torch refuses this for subclasses. What has no data is all zeros."""
        return (np.zeros(self.shape, int) if self.content.is_meta else self.content).tolist()

    @classmethod
    def __torch_dispatch__(cls, operation: Any, *_: Any) -> Any:
        raise RuntimeError(f"{operation} on a traced tensor outside its mode")


class MemoryTracker(TorchDispatchMode):
    """While active, new tensors are traced ones."""

    def __init__(self, device: str) -> None:
        """device: type of the one that is meant, a key of `DEVICES`."""
        super().__init__()
        self.device, self.is_gloo = DEVICES[device], device == "cpu"
        self.storages: WeakValueDictionary[int, Storage] = WeakValueDictionary()
        self.categories = ["other"]
        """What is allocated next is of the last of these."""
        self.layer: int | None = None
        """And within this layer."""
        self.segments = [Segment(("", None))]
        self.axes: dict[str, str] = {}
        """Axis of the mesh by name of its group; exchanges in other groups are not counted."""

    def mark(self, name: str, layer: int | None = None) -> None:
        """Begin another segment."""
        self.layer = layer
        self.segments.append(Segment((name, layer)))

    def begin(self, name: str) -> list[Segment]:
        """Begin another trace, with that mark; returns the one so far."""
        trace, self.segments = self.segments, []
        self.mark(name)
        return trace

    def wrap(self, content: Tensor) -> Traced:
        """The traced form of a tensor on the meta device, or of one with data."""
        if content.is_floating_point() and not content.is_meta:
            shape, stride = content.shape, content.stride()
            content = torch.empty_strided(shape, stride, dtype=content.dtype, device="meta")
        raw = content.untyped_storage()
        storage = self.storages.get(raw._cdata)
        if storage is None:
            storage = self.storages[raw._cdata] = Storage(self, raw.nbytes())
        return Traced(content, self.device, storage)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch._C._get_dispatch_mode(_FAKE) is not None or operation.namespace == "profiler":
            return operation(*args, **kwargs)
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # comes again for the local tensors
        contents: list[Tensor] = []
        given: dict[int, Tensor] = {}
        """By id of the content."""

        def unwrap(x: Tensor) -> Tensor:
            content = x.content if isinstance(x, Traced) else x
            contents.append(content)
            given[id(content)] = x
            return content

        args, kwargs = _map(unwrap, args), _map(unwrap, kwargs)
        results = self._run(operation, args, kwargs, contents)
        return _map(lambda x: given[id(x)] if id(x) in given else self.wrap(x), results)

    def _run(self, operation: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """The operation on contents."""
        if operation in COLLECTIVES:
            return self._exchange(operation, args)
        if operation is WAIT:
            return args[0]
        if not given:
            return _make(operation, args, kwargs)
        without_data = any(x.is_meta for x in given)
        if operation is _item and without_data:
            return args[0].dtype == torch.bool  # checks succeed, numbers are 0
        if kwargs.get("device") is not None:
            without_data |= torch.device(kwargs["device"]).type == "meta"
            kwargs["device"] = "meta" if without_data else "cpu"
        if without_data:
            args, kwargs = _map(_without_data, args), _map(_without_data, kwargs)
        return operation(*args, **kwargs)

    def _exchange(self, operation: Any, args: Any) -> Any:
        collective = COLLECTIVES[operation]
        result = collective.run(*args)
        n_bytes = collective.n_bytes(args, result)
        if self.is_gloo and collective.kind == REDUCE_SCATTER:
            Storage(self, n_bytes)  # gloo copies its input; let go of at once
        axis = self.axes.get(collective.group_name(args))
        if axis is not None:
            self.segments[-1].exchanged[f"{axis} {collective.kind}"] += n_bytes
        return result


def storage_of(tensor: Tensor) -> Storage:
    """What is counted of a traced tensor's storage."""
    assert isinstance(tensor, Traced)
    return tensor.storage_


_FAKE = torch._C._TorchDispatchModeKey.FAKE
"""DTensor computes on fake tensors what becomes of shapes."""
_item = torch.ops.aten._local_scalar_dense.default


def _map(function: Callable[[Tensor], Any], x: Any) -> Any:
    """`x` with the function applied to all tensors in it."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, list | tuple):
        return type(x)([_map(function, item) for item in x])
    if isinstance(x, dict):
        return {name: _map(function, item) for name, item in x.items()}
    return x


def _without_data(x: Tensor) -> Tensor:
    """Integers with data that meet a tensor without leave theirs behind."""
    return x if x.is_meta else x.to("meta")


def _make(operation: Any, args: Any, kwargs: Any) -> Any:
    """A new tensor: with data if it is one of few integers."""
    made = operation(*args, **kwargs | {"device": "meta"})
    if made.dtype not in _WITH_DATA or made.numel() > _LARGEST_REAL:
        return made
    return operation(*args, **kwargs | {"device": "cpu"})
