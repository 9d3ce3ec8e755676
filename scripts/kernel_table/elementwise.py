"""RMSNorm, RoPE, and the losses of a chunk of tokens."""

from collections.abc import Callable
from functools import partial

import torch

from kernels.layers import cross_entropy_triton, norm_triton, rope_triton
from scripts.kernel_table.case import SIZE, Case


def cases() -> list[Case]:
    """At the widths of models: hidden states of 4096 and 7168, heads of 64 and 128."""
    found = []
    for width in (64, SIZE, 7168):
        x, weight = torch.empty(SIZE, width, dtype=torch.bfloat16), torch.empty(width)
        rstd = torch.empty(SIZE)
        everyday = width != 64
        launches: dict[str, Callable[..., object]] = {
            "rms_norm": partial(norm_triton.forward, x, weight, 1e-5),
            "rms_norm backward": partial(norm_triton.backward, x, x, weight, rstd),
        }
        for name, run in launches.items():
            found.append(Case(f"{name} {width}", lambda fp8, run=run: run(), everyday=everyday))
    for width in (64, 128):
        wide = torch.empty(SIZE, 32, width + 128, dtype=torch.bfloat16)
        table = torch.empty(SIZE, width // 2)
        for form, interleaved in (("halves", False), ("interleaved", True)):
            run = partial(rope_triton.rotate, wide[..., :width], table, table, interleaved, False)
            found.append(Case(f"rotate {width} {form}", lambda fp8, run=run: run()))
    logits = torch.empty(SIZE, 129280, dtype=torch.bfloat16)
    targets, whole = torch.zeros(SIZE, dtype=torch.int64), torch.empty(SIZE)
    losses = cross_entropy_triton.token_losses_
    for name, given, with_gradient in (
        ("token losses", None, False),
        ("token losses and gradient", None, True),
        ("token losses and gradient, divided vocabulary", whole, True),
    ):
        run = partial(losses, logits, targets, given, 1e-4, with_gradient)
        found.append(Case(name, lambda fp8, run=run: run()))
    return found
