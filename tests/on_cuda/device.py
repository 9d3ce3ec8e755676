"""CUDA without CUDA: the code that runs on a GPU, on tensors that report `cuda:0` and have no data.

`CudaTracker` is the mode of `parallel.memory.tracker`, with three differences:

- Tensors know where they are. An operation on tensors of two devices is an error, as on a GPU.
- Our operators run what they run on CUDA, up to the launch, which `tests.on_cuda.launches` checks;
  the result must be that of the operator's fake form.
- What makes the host wait for the device is recorded with its place in our code.

Small integer tensors have data, since splits of exchanges depend on it. The choice of experts,
which a kernel without data cannot compute, is the even one.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.distributed.fsdp._fully_shard import _fully_shard

from configs.parallel_dims import ParallelDims
from parallel import mesh as meshes
from parallel.memory import model as traced_model
from parallel.memory import tracker as tracking
from parallel.memory.model import TracedModel
from parallel.memory.tracker import MemoryTracker, Traced

ROOT = Path(__file__).resolve().parents[2]
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
_aten = torch.ops.aten
_WAITING = (
    _aten.nonzero.default, _aten.masked_select.default, _aten.unique_dim.default,
    _aten._unique2.default, _aten.repeat_interleave.Tensor, _aten.bincount.default,
)  # fmt: skip
"""Operations that read their result's size, or a value, on the host."""
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
"""Operations of aten that may have indices on the host."""


class Fault(RuntimeError):
    """What would fail on a GPU."""


def place_of() -> str:
    """`file:line` of the innermost function of the project that runs."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests"):
            name = str(path.relative_to(ROOT))
            if not name.startswith(("parallel/memory/", ".venv/")):
                return f"{name}:{frame.lineno} {frame.name}"
    return "outside of the project"


class OnDevice(Traced):
    """A tensor that reports where it is."""

    place: torch.device
    made_at = ""
    """The operation and the place in our code, of a tensor on the host."""

    @staticmethod
    def __new__(cls, content: Tensor, device: torch.device, storage: Any) -> Any:
        # for autograd, which would look for a stream of the device
        return Traced.__new__(cls, content, torch.device("meta"), storage)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self.place.type == "cuda"

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return self.place.type == "cpu"

    def data_ptr(self) -> int:
        """Storages begin at multiples of 512, as in torch's allocator."""
        storage = self.content.untyped_storage()._cdata
        return (storage << 9) + self.content.storage_offset() * self.itemsize

    def tolist(self) -> Any:
        if self.place == CUDA:
            self.storage_.tracker.reads[f"{place_of()} tolist"] += 1  # type: ignore[attr-defined]
        return super().tolist()

    def is_pinned(self, *_: Any) -> bool:
        return True


class CudaTracker(MemoryTracker):
    """The mode."""

    def __init__(self, device: str = "cuda") -> None:
        super().__init__("cuda")
        assert device == "cuda"
        self.device = CUDA
        self.reads: Counter[str] = Counter()
        """Places where the host waits for the device."""
        self.operators: Counter[str] = Counter()
        """Our operators that ran."""
        self.place = CUDA
        """Of the next results."""
        self.running: Any = None
        """The operation."""

    def wrap(self, content: Tensor) -> Traced:
        made = super().wrap(content)
        assert isinstance(made, OnDevice)
        made.place = self.place
        if self.place == CPU:
            made.made_at = f", made by {self.running} at {place_of()}"
        return made

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if torch._C._get_dispatch_mode(tracking._FAKE) is not None or any(
            issubclass(kind, torch.distributed.tensor.DTensor) for kind in types
        ):
            return super().__torch_dispatch__(operation, types, args, kwargs)
        if operation in (_aten._pin_memory.default, _aten.pin_memory.default):
            return args[0]
        if operation.namespace == "aten" and operation._schema.name == "aten::to":
            operation, args, kwargs = _as_copy(args, kwargs)  # in inference mode
        given = [*_tensors(args), *_tensors(kwargs)]
        before, self.place = self.place, self._place(operation, args, kwargs, given)
        self.running = operation
        try:
            self._note_reads(operation, args, kwargs, given)
            if operation.namespace == "phalanx" and self.place == CUDA:
                return self._operator(operation, args, kwargs)
            return super().__torch_dispatch__(operation, types, args, kwargs)
        finally:
            self.place = before

    def _place(self, operation: Any, args: Any, kwargs: Any, given: list[Tensor]) -> torch.device:
        """The device of the results. Raises Fault for tensors of several devices."""
        if kwargs.get("device") is not None:
            # torch's own code copies the device of a tensor, which is `meta` for it
            return CPU if torch.device(kwargs["device"]).type == "cpu" else CUDA
        if not given:
            return CPU
        if operation is _aten._has_compatible_shallow_copy_type.default:
            return CUDA
        if operation in _COPIES:
            return _device_of(given[0])
        name = operation._schema.name.split("::")[-1]
        if operation.namespace == "aten" and name in _INDEXED:
            indices = [x for x in _tensors(args[1]) if _device_of(x) != _device_of(given[0])]
            if indices:
                raise Fault(f"{place_of()}: {operation} of a tensor on {_device_of(given[0])} "
                            f"with indices on {_device_of(indices[0])}")  # fmt: skip
        # a number on the host is passed to the kernel
        placed = {_device_of(x) for x in given if x.ndim or _device_of(x) == CUDA}
        if len(placed) > 1 and operation.namespace not in ("c10d", "profiler"):
            shapes = [
                f"{list(x.shape)} on {_device_of(x)}{getattr(x, 'made_at', '')}" for x in given
            ]
            raise Fault(f"{place_of()}: {operation} of {', '.join(shapes)}")
        return placed.pop() if placed else _device_of(given[0])

    def _note_reads(self, operation: Any, args: Any, kwargs: Any, given: list[Tensor]) -> None:
        on_device = any(_device_of(x) == CUDA for x in given)
        is_read = operation is _aten._local_scalar_dense.default or operation in _WAITING
        is_read &= kwargs.get("output_size") is None
        if operation is _aten._to_copy.default and kwargs.get("device") is not None:
            is_read = torch.device(kwargs["device"]).type == "cpu"
        if operation is _aten.copy_.default:
            is_read = _device_of(args[0]) == CPU and _device_of(args[1]) == CUDA
        if is_read and on_device:
            self.reads[f"{place_of()} {operation._schema.name.split('::')[-1]}"] += 1

    def _operator(self, operation: Any, args: Any, kwargs: Any) -> Any:
        """What an operator of ours does on CUDA; its fake form must have the same results."""
        name = operation._schema.name
        self.operators[name] += 1
        with self:
            results = OPDEFS[name]._init_fn(*args, **kwargs)
        contents, content_kwargs = _contents(args), _contents(kwargs)
        fakes = operation(*contents, **content_kwargs)
        found, expected = [*_tensors(results)], [*_tensors(fakes)]
        shown = [[_described(x) for x in some] for some in (found, expected)]
        if shown[0] != shown[1]:
            raise Fault(f"{name}: its kernel returns {shown[0]}, its fake form {shown[1]}")
        if wrong := [x for x in found if _device_of(x) != CUDA]:
            raise Fault(f"{name}: returns a tensor on {_device_of(wrong[0])}")
        self._fill(name, args, found)
        return results

    def _fill(self, name: str, args: Any, found: list[Tensor]) -> None:
        """Write the integers that the kernel would have written, if they are known."""
        if name == "phalanx::route":
            weights_TK, ids_TK, counts_E = found
            T, K = weights_TK.shape
            ids = (torch.arange(T * K) % len(counts_E)).view(T, K)
            if args[2] is not None and not _content(args[2]).is_meta:
                ids = _content(args[2])
            _write(ids_TK, ids)
            _write(counts_E, torch.bincount(ids.flatten(), minlength=len(counts_E)))
        if name == "phalanx::permutation":
            if _content(args[0]).is_meta:
                return
            made = OPDEFS[name]._init_fn(_content(args[0]), *args[1:])
            for target, value in zip(found, made, strict=True):
                _write(target, value)


@contextmanager
def cuda_without_cuda() -> Iterator[None]:
    """Context in which torch seems to have one CUDA device of compute capability 9.0, for tensors
    of a `CudaTracker`, which `parallel.memory` then uses."""
    properties = type("Properties", (), {"multi_processor_count": 132, "gcnArchName": ""})()
    fakes: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "set_device": lambda _: None,
        "synchronize": lambda *_: None,
        # one stream, in the order of the host
        "Stream": torch.cpu.Stream,
        "Event": torch.cpu.Event,
        "current_stream": torch.cpu.current_stream,
        "stream": torch.cpu.stream,
    }
    with ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(patch.object(torch.cuda, name, fake))
        event = patch.object(torch.cpu.Stream, "record_event", lambda *_: torch.cpu.Event())
        stack.enter_context(event)
        # `torch.tensor` creates a tensor on the host and then copies it
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        stack.enter_context(patch.object(tracking, "Traced", OnDevice))
        stack.enter_context(patch.object(traced_model, "MemoryTracker", CudaTracker))
        stack.enter_context(patch.object(traced_model.meshes, "build", _meshes))
        # FSDP2 allocates while it is applied, outside of the mode
        stack.enter_context(patch.object(_fully_shard, "_get_device_from_mesh", lambda _: CPU))
        stack.enter_context(patch.object(TracedModel, "_watch_group", _on_cuda))
        yield


_watch_group, _build = TracedModel._watch_group, meshes.build


def _meshes(dims: ParallelDims, _: str) -> meshes.Mesh:
    """Meshes of ranks that do not exist, whose tensors are on CUDA."""
    made = _build(dims, "cpu")
    for mesh in (made.dense, made.whole, made.expert):
        mesh._device_type = "cuda"
    return made


def _on_cuda(model: TracedModel, group: Any) -> None:
    """From here on FSDP2 allocates on CUDA."""
    for part in (group, *group.fsdp_params):
        part.device = CUDA
    _watch_group(model, group)


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        for item in x.values():
            yield from _tensors(item)
    elif isinstance(x, (list, tuple)):
        for item in x:
            yield from _tensors(item)


def _device_of(x: Tensor) -> torch.device:
    """Tensors outside of the mode are on the host."""
    return x.place if isinstance(x, OnDevice) else CPU


def _as_copy(args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """`Tensor.to` in any of its forms, as the copy that it makes."""
    made = {key: kwargs[key] for key in ("dtype", "device") if kwargs.get(key) is not None}
    for x in args[1:]:
        if isinstance(x, torch.dtype):
            made["dtype"] = x
        elif isinstance(x, (torch.device, str)):
            made["device"] = torch.device(x)
        elif isinstance(x, Tensor):
            made |= {"dtype": x.dtype, "device": _device_of(x)}
    return _aten._to_copy.default, args[:1], made


def _content(x: Any) -> Any:
    return x.content if isinstance(x, Traced) else x


def _contents(x: Any) -> Any:
    """Arguments of a fake form, without data."""
    if isinstance(x, Tensor):
        content = _content(x)
        return content if content.is_meta else content.to("meta")
    if isinstance(x, dict):
        return {key: _contents(value) for key, value in x.items()}
    return type(x)(map(_contents, x)) if type(x) in (list, tuple) else x


def _described(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), x.dtype, tuple(x.stride()) if x.numel() else ()


def _write(target: Tensor, value: Tensor) -> None:
    assert isinstance(target, OnDevice)
    if target.content.is_meta:
        target.content = value.clone()
    else:
        target.content.copy_(value)
