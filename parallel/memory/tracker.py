"""A mode that counts the bytes that tensors hold, by category, while code runs on tensors without
data.

The memory that a step keeps or needs temporarily depends on its code, autograd, FSDP2 and
recomputation. That code itself runs, on tensors that have shape, dtype, strides and a storage that
is counted, but no data: operations on floating-point tensors run on torch's meta device. Small
integer tensors have data, since the host reads some of them: the number of rows of an expert. So a
block of a 671B model runs in a fraction of a second and without memory.

A storage is counted from the creation of its first tensor until the last one, or autograd, releases
it: the size requested from an allocator, without the allocator's overhead, and without temporaries
inside a single operation of torch. (Torch's `MemTracker` counts the same of real tensors.)
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.memory.collectives import COLLECTIVES, COPIES_ON_GLOO, WAIT

DEVICES = {"cpu": torch.device("cpu"), "cuda": torch.device("meta")}
"""The device that traced tensors report: with `meta`, code uses the path of an accelerator without
launching a kernel."""
_LARGEST_REAL = 2**24
"""Maximum number of elements of integer tensors with data."""
_WITH_DATA = (torch.int64, torch.int32, torch.bool)
"""Not bytes: FP8 values are sent as bytes."""


class Event(NamedTuple):
    """Bytes that are allocated or freed."""

    category: str
    n_bytes: int
    layer: int | None
    """The layer that allocated the storage; None outside all layers."""


Mark = tuple[str, int | None]
"""What begins, and in which layer; None outside all layers."""


class Segment:
    """The events between two marks."""

    def __init__(self, mark: Mark) -> None:
        self.mark = mark
        self.events: list[Event] = []
        self.exchanged: Counter[str] = Counter()
        """Bytes by axis of the mesh and type of collective."""


class Storage:
    """The counted size of a storage, and the methods of `torch.UntypedStorage` that FSDP2 uses."""

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
    """On the meta device; integers with data are on the CPU."""
    storage_: Storage
    is_meta = False
    """Otherwise FSDP2 would treat parameters as not materialized."""

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
        """Torch raises for subclasses. Values without data are zeros."""
        return (np.zeros(self.shape, int) if self.content.is_meta else self.content).tolist()

    @classmethod
    def __torch_dispatch__(cls, operation: Any, *_: Any) -> Any:
        raise RuntimeError(f"{operation} on a traced tensor outside its mode")


class MemoryTracker(TorchDispatchMode):
    """Mode in which new tensors are traced."""

    def __init__(self, device: str) -> None:
        """device: the simulated device type, a key of `DEVICES`."""
        super().__init__()
        self.device, self.is_gloo = DEVICES[device], device == "cpu"
        self.storages: WeakValueDictionary[int, Storage] = WeakValueDictionary()
        self.categories = ["other"]
        """Stack of categories; the next allocations belong to the last."""
        self.layer: int | None = None
        """The layer of the next allocations."""
        self.segments = [Segment(("", None))]
        self.axes: dict[str, str] = {}
        """Axis of the mesh by name of its group; communication in other groups is not counted."""

    def mark(self, name: str, layer: int | None = None) -> None:
        """Begin a new segment."""
        self.layer = layer
        self.segments.append(Segment((name, layer)))

    def begin(self, name: str) -> list[Segment]:
        """Begin a new trace with that mark; returns the previous one."""
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
            return NotImplemented  # called again for the local tensors
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
        """Run the operation on contents."""
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
        if not without_data:
            return operation(*args, **kwargs)
        args, kwargs = _map(_without_data, args), _map(_without_data, kwargs)
        if _makes_new_tensors(operation):
            return _thawed(_made_by(operation, _frozen(args), _frozen([*kwargs.items()])))
        return operation(*args, **kwargs)

    def _exchange(self, operation: Any, args: Any) -> Any:
        collective = COLLECTIVES[operation]
        result = collective.run(*args)
        n_bytes = collective.n_bytes(args, result)
        if self.is_gloo and operation is COPIES_ON_GLOO:
            Storage(self, n_bytes)  # freed at once
        axis = self.axes.get(collective.group_name(args))
        if axis is not None:
            self.segments[-1].exchanged[f"{axis} {collective.kind}"] += n_bytes
        return result


def storage_of(tensor: Tensor) -> Storage:
    """The counted storage of a traced tensor."""
    assert isinstance(tensor, Traced)
    return tensor.storage_


_FAKE = torch._C._TorchDispatchModeKey.FAKE
"""DTensor uses fake tensors to compute shapes."""
_item = torch.ops.aten._local_scalar_dense.default


def _map(function: Callable[[Tensor], Any], x: Any) -> Any:
    """Apply `function` to all tensors in `x`."""
    if isinstance(x, Tensor):
        return function(x)
    kind = type(x)
    if kind is tuple or kind is list:
        return kind([_map(function, item) for item in x])
    if kind is dict:
        return {name: _map(function, item) for name, item in x.items()} if x else x
    return x


@functools.cache
def _makes_new_tensors(operation: Any) -> bool:
    """Whether results share no memory with arguments, so that layouts determine layouts."""
    schema = operation._schema
    return not schema.is_mutable and all(x.alias_info is None for x in schema.returns)


@functools.lru_cache(2**14)
def _made_by(operation: Any, args: Any, kwargs: Any) -> Any:
    """The layouts of an operation's results. Torch computes many of them in Python, and all layers
    have the same ones."""
    return _frozen(operation(*_thawed(args), **dict(_thawed(kwargs))))


def _frozen(x: Any) -> tuple[Any, ...]:
    """A hashable form, with the layout of a tensor; the forms of 1, 1.0 and True differ."""
    if isinstance(x, Tensor):
        return Tensor, x.shape, x.stride(), x.dtype
    return (tuple, *map(_frozen, x)) if isinstance(x, (tuple, list)) else (type(x), x)


def _thawed(x: tuple[Any, ...]) -> Any:
    """The inverse of `_frozen`, with tuples for lists and new tensors."""
    kind, *rest = x
    if kind is Tensor:
        return torch.empty_strided(rest[0], rest[1], dtype=rest[2], device="meta")
    return tuple(map(_thawed, rest)) if kind is tuple else rest[0]


def _without_data(x: Tensor) -> Tensor:
    """Convert an integer tensor to one without data, for operations with such a tensor."""
    return x if x.is_meta else x.to("meta")


def _make(operation: Any, args: Any, kwargs: Any) -> Any:
    """A new tensor, with data if it has few integers."""
    made = operation(*args, **kwargs | {"device": "meta"})
    if made.dtype not in _WITH_DATA or made.numel() > _LARGEST_REAL:
        return made
    return operation(*args, **kwargs | {"device": "cpu"})
