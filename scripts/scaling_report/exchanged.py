"""Bytes that a rank exchanged in the profiled step, next to the prediction of `--check`.

A trace names a collective and the shapes of its tensors, so bytes and kind are exact. It does not
name the axis of the mesh. The number of ranks, which follows from the shapes of gathers and
scatters and from the parts of an all-to-all, does, except where two axes have the same size or the
collective has the same shape for any number of ranks (all-reduce): then their bytes are one row.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from configs.errors import ConfigError, UserError
from configs.parallel_dims import resolve
from scripts.scaling_report.runs import MeasuredRun
from scripts.scaling_report.traces import ALL_TO_ALL, reduce_scatters
from train.memory import predict_even

_SINGLE = {
    "c10d::_allgather_base_": ("all-gather", 0, 1),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1, 0),
}
"""Kind, and indices of the larger and the smaller tensor, whose ratio is the number of ranks."""
_FUNCTIONAL = {
    "_c10d_functional::all_gather_into_tensor": ("all-gather", 1),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", 2),
}
"""Kind, and index of the number of ranks. These have one tensor, the input."""
_ALL_REDUCE = "gloo:all_reduce"
_SPLITS = 3
"""Index of the sizes of the parts that an all-to-all receives, one per rank."""
_ITEM_BYTES = {
    "float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "int": 4,
    "unsigned char": 1, "signed char": 1, "bool": 1, "c10::Float8_e4m3fn": 1,
    "c10::Float8_e5m2": 1,
}  # fmt: skip
"""By the name of a dtype in a trace."""


@dataclass(frozen=True)
class Exchange:
    """Collectives of one kind on one axis, or on several that a trace does not distinguish."""

    kind: str
    axes: tuple[str, ...]
    predicted: float
    """Bytes per rank and step; of a gather the result, of others the input."""
    measured: float | None
    """The same of the profiled step, mean over the ranks; None if its trace does not have it."""


def exchanged(run: MeasuredRun, traces: Sequence[Sequence[dict[str, Any]]]) -> list[Exchange]:
    """The rows of a run of several ranks. traces: events of the profiled step of each rank."""
    if run.ranks == 1:
        return []
    try:
        dims = resolve(run.config, run.ranks)
    except ConfigError as error:
        raise UserError(
            f"{run.folder}: config.toml is not that of {run.ranks} ranks: {error}"
        ) from None
    sizes = {axis: size for axis, size, _ in dims.table()}
    sizes["dp_shard_tp"] = dims.dp_shard * dims.tp
    on_cuda = any(event.get("cat") == "kernel" for event in traces[0])
    dtype = getattr(torch, run.compute_dtype or "float32")
    evenly = predict_even(run.config, dims, "cuda" if on_cuda else "cpu", dtype)
    measured: Counter[tuple[str, int | None]] = Counter()
    for events in traces:
        measured.update(counted(events))
    mean = {key: n_bytes / len(traces) for key, n_bytes in measured.items()}
    rows = compared(evenly.exchanged, sizes, mean)
    if on_cuda:  # a trace of NCCL does not have the dtype of an all-reduce
        rows = [replace(r, measured=None) if r.kind == "all-reduce" else r for r in rows]
    return rows


def counted(events: Sequence[dict[str, Any]]) -> Counter[tuple[str, int | None]]:
    """Bytes of one rank by kind and number of ranks (None: not known)."""
    found: Counter[tuple[str, int | None]] = Counter()
    reduced = 0  # in reduce-scatters that gloo computes as all-reduces
    by_all_to_all = {id(event): ranks for event, ranks in reduce_scatters(events)}
    for event in events:
        name, args = event["name"], event.get("args", {})
        if name in _SINGLE:
            kind, larger, smaller = _SINGLE[name]
            n_bytes = _n_bytes(args, larger)
            found[kind, round(n_bytes / _n_bytes(args, smaller)) if n_bytes else None] += n_bytes
        elif name in _FUNCTIONAL:
            kind, place = _FUNCTIONAL[name]
            size = int(args["Concrete Inputs"][place])
            n_bytes = _n_bytes(args, 0) * (size if kind == "all-gather" else 1)
            found[kind, size] += n_bytes
            reduced += n_bytes * (kind == "reduce-scatter")
        elif name == ALL_TO_ALL and id(event) in by_all_to_all:
            found["reduce-scatter", by_all_to_all[id(event)]] += _n_bytes(args, 1)
        elif name == ALL_TO_ALL:
            parts = [
                word for word in args["Concrete Inputs"][_SPLITS].strip("[]").split(",") if word
            ]
            found["all-to-all", len(parts) or None] += _n_bytes(args, 1)
        elif name == _ALL_REDUCE:
            found["all-reduce", None] += _n_bytes(args, 0)
    if ("all-reduce", None) in found:
        found["all-reduce", None] -= reduced
    return found


def _n_bytes(args: dict[str, Any], index: int) -> int:
    item: int = _ITEM_BYTES[args["Input type"][index]]
    return item * math.prod(args["Input Dims"][index])


def compared(
    predicted: Mapping[str, float],
    sizes: Mapping[str, int],
    measured: Mapping[tuple[str, int | None], float],
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
            rows.append(
                Exchange(kind, tuple(sorted(axes)), sum(axes.values()), sum(found.values()))
            )
            continue
        for size in sorted({sizes[axis] for axis in axes} | found.keys(), key=lambda n: n or 0):
            same = tuple(sorted(axis for axis in axes if sizes[axis] == size))
            total = sum(axes[axis] for axis in same)
            rows.append(Exchange(kind, same, total, found.get(size, 0.0)))
    return rows
