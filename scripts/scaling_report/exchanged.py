"""Bytes that a rank exchanged in the profiled step, next to the prediction of `--check`.

A trace names a collective and the shapes of its tensors, so bytes and kind are exact. It does not
name the axis of the mesh. The number of ranks, which follows from the shapes of gathers and
scatters and from the parts of an all-to-all, does, except where two axes have the same size or the
collective has the same shape for any number of ranks (all-reduce): then their bytes are one row.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from configs.parallel_dims import resolve
from scripts.scaling_report.runs import MeasuredRun
from train.memory import predict

ALL_GATHER, REDUCE_SCATTER = "all-gather", "reduce-scatter"
_LARGER = {
    "c10d::_allgather_base_": (ALL_GATHER, 0, 1),
    "c10d::_reduce_scatter_base_": (REDUCE_SCATTER, 1, 0),
}
"""Kind, and the index of the larger and the smaller tensor, of operations of single tensors."""
_LISTS = {
    "c10d::allgather_into_tensor_coalesced_": (ALL_GATHER, 0, 1),
    "c10d::reduce_scatter_tensor_coalesced_": (REDUCE_SCATTER, 1, 0),
}
"""The same of lists of tensors."""
_ALL_TO_ALL, _ALL_REDUCE = "c10d::alltoall_base_", "gloo:all_reduce"


@dataclass(frozen=True)
class Exchange:
    """Collectives of one kind on one axis, or on several that cannot be told apart."""

    kind: str
    axes: tuple[str, ...]
    predicted: float
    """Bytes per rank and step; of a gather the result, of others the input."""
    measured: float
    """The same of the profiled step, mean over the ranks."""


def exchanged(run: MeasuredRun, traces: Sequence[Sequence[dict[str, Any]]]) -> list[Exchange]:
    """The rows of a run of several ranks. traces: events of the profiled step of each rank."""
    if run.ranks == 1:
        return []
    dims = resolve(run.config, run.ranks)
    sizes = {axis: size for axis, size, _ in dims.table()}
    sizes["dp_shard_tp"] = dims.dp_shard * dims.tp
    on_cuda = any(event.get("cat") == "kernel" for event in traces[0])
    dtype = getattr(torch, run.compute_dtype or "float32")
    evenly, _ = predict(run.config, dims, "cuda" if on_cuda else "cpu", dtype)
    measured: Counter[tuple[str, int | None]] = Counter()
    for events in traces:
        measured.update(counted(events))
    mean = {key: n_bytes / len(traces) for key, n_bytes in measured.items()}
    return compared(evenly.exchanged, sizes, mean)


def compared(
    predicted: dict[str, float], sizes: dict[str, int], measured: dict[tuple[str, int | None], float]
) -> list[Exchange]:
    """Rows of predicted bytes (by "axis kind") and measured ones (by kind and number of ranks; None
    where it is not known). sizes: of each axis."""
    by_kind: dict[str, dict[str, float]] = {}
    for name, n_bytes in predicted.items():
        axis, _, kind = name.partition(" ")
        by_kind.setdefault(kind, {})[axis] = n_bytes
    rows = []
    for kind in sorted(by_kind.keys() | {kind for kind, _ in measured}):
        axes, found = by_kind.get(kind, {}), {n: b for (k, n), b in measured.items() if k == kind}
        if None in found:  # one row
            rows.append(Exchange(kind, tuple(sorted(axes)), sum(axes.values()), sum(found.values())))
            continue
        for size in sorted({sizes[axis] for axis in axes} | found.keys(), key=lambda n: n or 0):
            same = tuple(sorted(axis for axis in axes if sizes[axis] == size))
            total = sum(axes[axis] for axis in same)
            rows.append(Exchange(kind, same, total, found.get(size, 0.0)))
    return rows
