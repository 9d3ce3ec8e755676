"""SwiGLU."""

import torch

from kernels import swiglu_triton
from scripts.kernel_cases.case import SIZE, Case


def cases() -> list[Case]:
    """Forward and backward."""
    x = torch.empty(SIZE, SIZE, dtype=torch.bfloat16)
    found = []
    weights, h = torch.empty(SIZE), torch.empty(SIZE, SIZE // 2, dtype=torch.bfloat16)
    found.append(Case("swiglu", lambda fp8: swiglu_triton.swiglu_forward(x, weights)))
    found.append(Case("swiglu backward", lambda fp8: swiglu_triton.swiglu_backward(h, x, weights)))
    return found
