"""In the lane of the interpreter: SwiGLU against its references."""

import numpy as np
import pytest
import torch

from kernels import swiglu, swiglu_triton
from tests.kernels.lane import relative


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 1025), (0, 8), (4, 2300)], ids=str)
def test_swiglu(shape: tuple[int, int], weighted: bool, dtype: torch.dtype) -> None:
    rows, width = shape
    gate_up, grad = torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)
    weights = torch.rand(rows) if weighted else None
    pairs = [
        (swiglu_triton.swiglu_forward(gate_up, weights), swiglu.swiglu_reference(gate_up, weights)),
        *zip(
            swiglu_triton.swiglu_backward(grad, gate_up, weights),
            swiglu.swiglu_backward_reference(grad, gate_up, weights),
            strict=True,
        ),
    ]
    for ours, reference in pairs:
        assert (ours is None) == (reference is None)
        if ours is not None and reference is not None and ours.numel():
            tolerance = 1e-6 if ours.dtype == torch.float32 else 2e-3
            assert ours.dtype == reference.dtype and relative(ours, reference) < tolerance


def test_swiglu_beyond_2_31() -> None:
    width, block = 2**29, 64
    gate_up = torch.randn(3, block).bfloat16()
    up = torch.randn(3, block).bfloat16()
    memory = torch.from_numpy(np.empty(3 * 2 * width * 2, np.uint8)).view(torch.bfloat16)
    rows = memory.as_strided((3, 2, block), (2 * width, width, 1))
    rows.copy_(torch.stack([gate_up, up], 1))
    out = torch.from_numpy(np.empty(3 * width * 2, np.uint8)).view(torch.bfloat16)
    swiglu_triton._forward[(3, 1)](memory, None, out, width, WEIGHTED=False, BLOCK=block)
    reference = swiglu.swiglu_reference(torch.cat([gate_up, up], 1))
    assert relative(out.as_strided((3, block), (width, 1)), reference) < 2e-3
