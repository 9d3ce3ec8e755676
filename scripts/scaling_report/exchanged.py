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
