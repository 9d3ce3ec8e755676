"""Capabilities of the current device, and where Triton runs."""

import importlib.util
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32: CUDA from sm_80 on, ROCm, and CPUs with
    AVX512-BF16 or AMX. Other CPUs emulate bf16 more slowly than they compute fp32."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def on_accelerator(x: Tensor) -> bool:
    """Whether Triton runs on the device of x. Callers write `device.on_accelerator(x)`, so that
    tests in Triton's interpreter can replace it in one place to return True for a CPU."""
    return x.is_cuda


def missing_triton() -> str:
    """What to install if the kernels for CUDA cannot be imported; empty if they can. On a CPU
    nothing needs Triton."""
    if importlib.util.find_spec("triton") is not None:
        return ""
    return "the kernels for CUDA need Triton 3.6 to 3.9: pip install 'triton>=3.6,<3.10'"


def launching_on(x: Tensor) -> AbstractContextManager[None]:
    """Context for every launch: Triton launches on the current device, which may not be that of
    x."""
    return torch.cuda.device(x.device)
