"""Tensors that weigh but hold nothing: run the model's own code and see what memory it would take.

What a model keeps for backward and what its temporaries need is decided by its code, by autograd
and by recomputation. Here that code itself runs, forward and backward, on tensors that have shape,
dtype, strides and a place in a `Ledger`, but no data: operations on floating-point tensors are
carried out on torch's meta device. Integers have data as long as they are small, since the host
reads some of them: how many rows an expert gets. So a block of a 671B model runs in a fraction of a
second and in no memory, and the result follows every change of that code by itself.

A storage is counted when the first tensor on it appears and until the last one, or autograd, lets
go of it: the memory that an allocator would be asked for, without what it adds (rounding,
fragmentation), and without temporaries inside a single operation of torch.

A shadow stands on a device of choice: `cpu`, where the code takes its CPU path, or `meta`, where it
takes that of an accelerator without launching a kernel.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

Bytes = Counter[str]
"""Bytes per kind of memory, or of exchange between ranks."""

_LARGEST_REAL = 2**24
"""Elements up to which tensors of integers have data."""
_c10d = torch.ops._c10d_functional


@dataclass
class Segment:
    """What happens between two marks: the most that is held at any moment and what is left, both
    relative to its start, and what is exchanged."""

    peak: Bytes = field(default_factory=Counter)
    net: Bytes = field(default_factory=Counter)
    exchanged: Bytes = field(default_factory=Counter)


Trace = list[Segment | str]
"""Segments and the marks between them."""


class Ledger:
    """Bytes held, by kind; the largest sum of them; bytes exchanged; and a record of all three in
    segments."""

    def __init__(self) -> None:
        self.now: Bytes = Counter()
        self.total = self.most = 0
        self.peak: Bytes = Counter()
        self.exchanged: Bytes = Counter()
        self.kinds = ["other"]
        """The kind of what is allocated next is the last of these."""

    def add(self, kind: str, n_bytes: int) -> None:
        """Hold so many bytes more, or less."""
        self.now[kind] += n_bytes
        self.total += n_bytes
        if self.total > self.most:
            self.most, self.peak = self.total, Counter(self.now)

    def tp_comm(self, group: str, kind: str, n_bytes: int) -> None:
        """The larger side of an exchange: what a gather gives, else what this rank puts in."""
        self.exchanged[f"{group} {kind}"] += n_bytes

    def replay(self, segment: Segment) -> None:
        """Hold and exchange what a recorded segment did."""
        self.exchanged.update(segment.exchanged)
        top = self.total + segment.peak.total()
        if top > self.most:
            self.most, self.peak = top, Counter(self.now)
            self.peak.update(segment.peak)
        self.now.update(segment.net)
        self.total += segment.net.total()

    def record(self, run: Callable[[Callable[[str], None]], None]) -> Trace:
        """What `run` does to this ledger. It is given a function that sets a mark."""
        trace: Trace = []
        start, sent_before = self._start(), Counter(self.exchanged)

        def close() -> None:
            nonlocal start, sent_before
            sent = _minus(self.exchanged, sent_before)
            trace.append(Segment(_minus(self.peak, start), _minus(self.now, start), sent))
            start, sent_before = self._start(), Counter(self.exchanged)

        def mark(name: str) -> None:
            close()
            trace.append(name)

        run(mark)
        close()
        return trace

    def _start(self) -> Bytes:
        self.most, self.peak = self.total, Counter(self.now)
        return Counter(self.now)


def _minus(later: Bytes, earlier: Bytes) -> Bytes:
    difference = Counter(later)
    difference.subtract(earlier)
    return difference


def extrapolate(low: Trace, high: Trace, factor: float) -> Trace:
    """`low + factor * (high - low)`, for traces of the same run at two sizes."""

    def beyond(a: Bytes, b: Bytes) -> Bytes:
        return Counter({kind: a[kind] + round(factor * (b[kind] - a[kind])) for kind in {*a, *b}})

    found: Trace = []
    for a, b in zip(low, high, strict=True):
        if isinstance(a, Segment) and isinstance(b, Segment):
            parts = [(a.peak, b.peak), (a.net, b.net), (a.exchanged, b.exchanged)]
            found.append(Segment(*(beyond(*part) for part in parts)))
        else:
            assert a == b
            found.append(a)
    return found


class _Storage:
    """A storage's entry in the ledger; it is struck when the last tensor on the storage goes."""

    def __init__(self, mode: "Shadows", key: int, n_bytes: int) -> None:
        self.mode, self.key, self.n_bytes = mode, key, n_bytes
        self.kind = mode.ledger.kinds[-1]
        mode.ledger.add(self.kind, n_bytes)

    def __del__(self) -> None:
        self.mode.ledger.add(self.kind, -self.n_bytes)


class Shadow(Tensor):
    """A tensor of a `Shadows` mode."""

    content: Tensor
    """On the meta device; integers on the CPU where they have data."""
    entry: _Storage

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device, entry: _Storage) -> "Shadow":
        shadow: Shadow = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        shadow.content, shadow.entry = inner, entry
        return shadow

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def tolist(self) -> Any:
        """Torch refuses this for subclasses."""
        return self.content.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation: Any, *_: Any) -> Any:
        raise RuntimeError(f"{operation} on a shadow outside its mode")


class Shadows(TorchDispatchMode):
    """While active, new tensors are shadows on `device`, entered in `ledger`."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.ledger = torch.device(device), Ledger()
        self.storages: WeakValueDictionary[int, _Storage] = WeakValueDictionary()
        self.pauses = False

    def given(self, *shape: int, dtype: torch.dtype) -> Shadow:
        """A tensor without data that somebody else accounts for."""
        self.pauses = True
        inner = torch.empty(shape, dtype=dtype, device="meta")
        self.pauses = False
        return self.wrap(inner, counted=False)

    def wrap(self, inner: Tensor, counted: bool = True) -> Shadow:
        """The shadow of a tensor on the meta device, or of integers with data.

        counted: false where somebody else accounts for the memory.
        """
        assert not isinstance(inner, Shadow)
        raw = inner.untyped_storage()
        storage = self.storages.get(raw._cdata)
        if storage is None:
            storage = _Storage(self, raw._cdata, raw.nbytes() if counted else 0)
            self.storages[storage.key] = storage
        return Shadow(inner, self.device, storage)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if self.pauses:
            return operation(*args, **kwargs or {})
        given: dict[int, Tensor] = {}

        def unwrap(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            inner = x.content if isinstance(x, Shadow) else x
            given[id(inner)] = x
            return inner

        args, kwargs = tree_map(unwrap, (args, kwargs or {}))
        tensors = list(given.values())
        if any(_is_meta(x) for x in tensors):
            args, kwargs = tree_map(_to_meta, (args, kwargs))
        if operation in _EXCHANGES:
            if operation is _c10d.reduce_scatter_tensor.default and self.device.type == "cpu":
                self.ledger.add(self.ledger.kinds[-1], args[0].nbytes)  # gloo copies its input
                self.ledger.add(self.ledger.kinds[-1], -args[0].nbytes)
            results = _exchange(operation, args)
            if operation in _KINDS:
                kind = _KINDS[operation]
                larger = results if kind == ALL_GATHER else args[0]
                self.ledger.tp_comm(args[-1], kind, larger.nbytes)
        elif tensors:
            if "device" in kwargs:
                kwargs["device"] = "meta" if any(map(_is_meta, tensors)) else "cpu"
            results = operation(*args, **kwargs)
        else:
            results = _make(operation, args, kwargs)

        def wrap(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return given[id(x)] if id(x) in given else self.wrap(x)

        return tree_map(wrap, results)


ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER = (
    "all-gather", "all-reduce", "all-to-all", "reduce-scatter",
)  # fmt: skip
_KINDS = {
    _c10d.all_gather_into_tensor.default: ALL_GATHER,
    _c10d.reduce_scatter_tensor.default: REDUCE_SCATTER,
    _c10d.all_to_all_single.default: ALL_TO_ALL,
    _c10d.all_reduce.default: ALL_REDUCE,
}
_EXCHANGES = {*_KINDS, _c10d.wait_tensor.default}


def _exchange(operation: Any, args: Any) -> Tensor:
    """What an exchange between ranks gives: a new tensor, or when waited for, itself. All ranks
    are taken to be alike, and this one to be the first."""
    x: Tensor = args[0]
    if operation is _c10d.wait_tensor.default:
        return x
    if operation is _c10d.all_reduce.default:
        return x.clone()
    if operation is _c10d.all_gather_into_tensor.default:
        return x.repeat(args[1], *[1] * (x.ndim - 1))
    if operation is _c10d.reduce_scatter_tensor.default:
        return x.new_empty(x.shape[0] // args[2], *x.shape[1:])
    got, sent = args[1:3]
    if x.is_meta:
        return x.new_empty(sum(got), *x.shape[1:])
    return torch.cat([x[: sent[0]]] * len(got))


def _is_meta(x: Tensor) -> bool:
    return (x.content if isinstance(x, Shadow) else x).is_meta


def _to_meta(x: Any) -> Any:
    """Integers with data that meet a tensor without leave theirs behind; numbers may stay."""
    if isinstance(x, Tensor) and not x.is_meta and x.ndim:
        return x.to("meta")
    return x


def _make(operation: Any, args: Any, kwargs: Any) -> Tensor:
    """A new tensor: with data if it is one of few integers."""
    made: Tensor = operation(*args, **kwargs | {"device": "meta"})
    if made.dtype.is_floating_point or made.numel() > _LARGEST_REAL:
        return made
    real: Tensor = operation(*args, **kwargs | {"device": "cpu"})
    return real
