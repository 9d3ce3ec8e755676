"""Gradient norm and clipping over parameters that live on different meshes.

Every element of every gradient is counted exactly once: each rank sums the squares of the shards
it speaks for, one all-reduce over all ranks adds them. Which mesh a shard belongs to does not
matter, so dense parameters and experts need no separate treatment.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from parallel.ranks import sum_over_ranks
from parallel.shards import local_of, speaks_for


def global_grad_norm(parameters: Iterable[nn.Parameter], rank: int) -> Tensor:
    """The 2-norm of the whole gradient, an fp64 scalar on the gradients' device.

    Not by torch's norm on a CPU: that of 4 M elements is off by 8e-5 in fp32 (torch 2.13), which
    would make the clipped gradient depend on how it is sharded. Its sum is pairwise, and exact to
    4e-9; norms on CUDA are too.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    spoken = [local_of(g) for g in grads if speaks_for(g, rank)]
    device = local_of(grads[0]).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    if spoken:
        if device.type == "cuda":
            squares = torch.stack(torch._foreach_norm(spoken)).double().square()
        else:
            squares = torch.stack([grad.square().sum() for grad in spoken]).double()
        total = squares.sum()
    return sum_over_ranks(total).sqrt()


def scale_grads(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients so that their global norm does not exceed `max_norm`."""
    grads = [local_of(p.grad) for p in parameters if p.grad is not None]
    torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0).float())
