"""The part of a tensor that a rank holds: a box of the logical tensor, and whether it is the
primary replica.

Checkpoints, clipping and initialization need the same properties of a DTensor: the offset and shape
of the local shard in the whole tensor, and, if several ranks hold the same shard (replicas), which
of them is the primary one.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from models.layers.box import Box


def box_of(tensor: Tensor) -> Box:
    """The box that this rank holds; a plain tensor is held whole by every rank."""
    if not isinstance(tensor, DTensor):
        whole = tuple(tensor.shape)
        return Box(whole, (0,) * len(whole), whole)
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return Box(tuple(tensor.shape), tuple(offset), tuple(shape))


def local_of(tensor: Tensor) -> Tensor:
    """The data of this rank's box, sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def zeros_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of another dtype that are divided as `tensor` is.

    `torch.zeros_like` first searches for the placement of every new shape.
    """
    zeros = torch.zeros_like(local_of(tensor), dtype=dtype)
    if not isinstance(tensor, DTensor):
        return zeros
    return DTensor.from_local(
        zeros, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape,
        stride=tensor.stride(),
    )  # fmt: skip


def is_primary_replica(tensor: Tensor, rank: int) -> bool:
    """Whether this rank is the primary one of all that hold the same box."""
    if not isinstance(tensor, DTensor):
        return rank == 0
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return all(
        index == 0
        for index, placement in zip(coordinate, tensor.placements, strict=True)
        if placement.is_replicate()
    )
