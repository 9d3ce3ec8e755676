"""Gradient norm and clipping over parameters on different meshes.

Every element of every gradient is counted exactly once: each rank sums the squares of the shards
of which it is the primary replica, one all-reduce over all ranks adds them. The mesh of a shard
is irrelevant, so dense parameters and experts need no separate treatment.

A sum of squares that overflows fp32 would be a silent error: a clip factor of 1 / inf makes
an update of zero, and RMSNorm converts a row to zeros, with a gradient of zero. So a number
above `LARGEST` is treated as not finite, in norms and in weights.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from parallel.ranks import sum_over_ranks
from parallel.shards import is_primary_replica, local_of

LARGEST = torch.finfo(torch.float32).max ** 0.5
"""1.8e19: the square of a larger number overflows in fp32."""
_PIECE = 2**18
"""Elements whose squares are summed at a time on a CPU: 1 MiB, which stays in cache."""


def largest_values(tensors: Iterable[Tensor]) -> Tensor:
    """The largest absolute value of this rank's part of each tensor, NaN if the part has one; on
    the device of the first. One pass over memory.

    On a CPU torch's infinity norm uses no vector instructions: 1 M elements take 3.8 ms, their
    minimum and maximum 0.2 (AMD EPYC with AVX2, torch 2.13).
    """
    parts = [local_of(tensor).detach() for tensor in tensors]
    # a part without elements has no maximum
    parts = [part if part.numel() else part.new_zeros(1) for part in parts]
    device = parts[0].device
    if all(part.device.type == "cpu" for part in parts):
        ends = torch.stack([torch.stack(torch.aminmax(part)) for part in parts])
        return ends.abs().amax(1)
    return torch.stack([each.to(device) for each in torch._foreach_norm(parts, torch.inf)])


def in_range(values: Tensor) -> Tensor:
    """Whether all are at most `LARGEST`; false for NaN."""
    return (values <= LARGEST).all()


def global_grad_norm(parameters: Iterable[nn.Parameter], rank: int) -> Tensor:
    """The 2-norm of the whole gradient, an fp64 scalar on the gradients' device.

    On a CPU torch's norm is not used: that of 4 M elements is off by 8e-5 in fp32 (torch 2.13),
    which would make the clipped gradient depend on how it is sharded. Its sum is pairwise, and
    exact to 4e-9; so are norms on CUDA.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    spoken = [local_of(g) for g in grads if is_primary_replica(g, rank)]
    device = local_of(grads[0]).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    if spoken:
        if device.type == "cpu":
            pieces = [piece for grad in spoken for piece in grad.flatten().split(_PIECE)]
            squares = torch.stack([piece.square().sum() for piece in pieces]).double()
        else:
            squares = torch.stack(torch._foreach_norm(spoken)).double().square()
        total = squares.sum()
    return sum_over_ranks(total).sqrt()


def other_replicas_in_range(parameters: Iterable[nn.Parameter], rank: int) -> Tensor:
    """Whether the gradients that this rank holds as another than the primary replica, which the
    norm does not contain, are in range."""
    grads = [p.grad for p in parameters if p.grad is not None]
    others = [grad for grad in grads if not is_primary_replica(grad, rank)]
    return in_range(largest_values(others)) if others else torch.tensor(True)


def scale_grads(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients so that their global norm does not exceed `max_norm`."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
    if factor.device.type == "cpu" and factor == 1.0:  # elsewhere the host would wait for it
        return
    torch._foreach_mul_([local_of(p.grad) for p in parameters if p.grad is not None], factor)
