"""Collectives between ranks that do not exist: their results on this rank, and their bytes.

All ranks are assumed to be alike, and this one to be the first. Bytes are those of the larger side:
the result of a gather, this rank's input of any other collective.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork

_c10d, _functional = torch.ops.c10d, torch.ops._c10d_functional


class Collective(NamedTuple):
    """Properties of an operation that a tracker uses."""

    kind: str
    run: Callable[..., Any]
    """The operation, on the tensors of a `MemoryTracker`."""
    counted: int | None
    """Index of the argument that is the larger side; None: the result is."""
    group: int = -1
    """Index of the argument with the group."""

    def n_bytes(self, args: Any, result: Any) -> int:
        return _n_bytes(result if self.counted is None else args[self.counted])

    def group_name(self, args: Any) -> str:
        group = args[self.group]
        boxed = isinstance(group, torch.ScriptObject)
        return dist.ProcessGroup.unbox(group).group_name if boxed else str(group)


def _n_bytes(x: Any) -> int:
    return int(x.nbytes) if isinstance(x, Tensor) else sum(map(_n_bytes, x))


def _gathered(x: Tensor, size: int, _: str) -> Tensor:
    return x.repeat(size, *[1] * (x.ndim - 1))


def _scattered(x: Tensor, _: str, size: int, __: str) -> Tensor:
    return x.new_empty(x.shape[0] // size, *x.shape[1:])


def _exchanged(x: Tensor, got: list[int], sent: list[int], _: str) -> Tensor:
    if x.is_meta:
        return x.new_empty(sum(got), *x.shape[1:])
    return torch.cat([x[: sent[0]]] * len(got))


def _in_place(outputs: Any, *_: Any) -> tuple[Any, Any]:
    return outputs, FakeWork().boxed()


def _gathered_in_place(outputs: list[list[Tensor]], inputs: list[Tensor], *_: Any) -> Any:
    for pieces, own in zip(outputs, inputs, strict=True):
        for piece in pieces:
            if not piece.is_meta:
                piece.copy_(own)  # counts, which the host will read
    return outputs, FakeWork().boxed()


ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER = "all-gather", "all-reduce", "reduce-scatter"
COLLECTIVES: dict[Any, Collective] = {
    _functional.all_gather_into_tensor.default: Collective(ALL_GATHER, _gathered, None),
    _functional.reduce_scatter_tensor.default: Collective(REDUCE_SCATTER, _scattered, 0),
    _functional.all_to_all_single.default: Collective("all-to-all", _exchanged, 0),
    _functional.all_reduce.default: Collective(ALL_REDUCE, lambda x, *_: x.clone(), 0),
    _c10d._allgather_base_.default: Collective(ALL_GATHER, _in_place, 0, 2),
    _c10d._reduce_scatter_base_.default: Collective(REDUCE_SCATTER, _in_place, 1, 2),
    # that of `parallel.gloo`; the experts' exchange is the functional operation
    _c10d.alltoall_base_.default: Collective(REDUCE_SCATTER, lambda *_: FakeWork().boxed(), 1, 2),
    _c10d.allgather_.default: Collective(ALL_GATHER, _gathered_in_place, 0, 2),
    _c10d.allreduce_.default: Collective(ALL_REDUCE, _in_place, 0, 1),
}
"""By operation."""
COPIES_ON_GLOO = _functional.reduce_scatter_tensor.default
"""Gloo copies its input."""
WAIT = _functional.wait_tensor.default
