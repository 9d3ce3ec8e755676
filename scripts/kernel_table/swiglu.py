"""SwiGLU, plain and quantized."""

from functools import partial

import torch
from torch import Tensor

from kernels.fp8 import BLOCK, empty_column_major
from kernels.mlp import swiglu_fp8_triton, swiglu_triton
from scripts.kernel_table.case import SIZE, Case


def cases() -> list[Case]:
    """Forward and backward of both activations, and the results in FP8."""
    x = torch.empty(SIZE, SIZE, dtype=torch.bfloat16)
    weights, h = torch.empty(SIZE), torch.empty(SIZE, SIZE // 2, dtype=torch.bfloat16)
    ends = torch.arange(SIZE // 64, SIZE + 1, SIZE // 64)
    counts = torch.full_like(ends, SIZE // 64)
    found = []
    for activation, suffix in (("swiglu", ""), ("clamped_swiglu", ", clamped")):
        forward = partial(swiglu_triton.swiglu_forward, x, weights, activation)
        backward = partial(swiglu_triton.swiglu_backward, h, x, weights, activation)
        to_fp8 = partial(swiglu_fp8_triton.forward, x, weights, activation, power_of_two=False)
        found.append(Case(f"swiglu{suffix}", lambda fp8, run=forward: run()))
        found.append(Case(f"swiglu backward{suffix}", lambda fp8, run=backward: run(False)))
        found.append(Case(f"swiglu backward and h{suffix}", lambda fp8, run=backward: run(True)))
        found.append(Case(f"swiglu to FP8{suffix}", to_fp8, everyday=not suffix))
        for stored in ("bf16", "FP8"):
            for groups in (True, False):
                at = (ends, counts) if groups else (None, None)
                launch = partial(_backward, h, x, weights, activation, at, stored == "FP8")
                name = f"swiglu backward, {stored} to FP8{', groups' if groups else ''}{suffix}"
                found.append(Case(name, launch, everyday=groups and not suffix))
    return found


def _backward(
    grad: Tensor,
    gate_up: Tensor,
    weights: Tensor,
    activation: str,
    groups: tuple[Tensor | None, Tensor | None],
    stored_in_fp8: bool,
    fp8: torch.dtype,
) -> None:
    scales = None
    if stored_in_fp8:
        gate_up = torch.empty(gate_up.shape, dtype=fp8)
        scales = empty_column_major((SIZE, SIZE // BLOCK), torch.float32, gate_up.device)
    swiglu_fp8_triton.backward(grad, gate_up, weights, activation, fp8, False, *groups, scales)
