"""What the device at hand does well, what it needs to be told, and where Triton runs."""

import ctypes
import platform
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32: CUDA from sm_80 on, ROCm, and CPUs with
    AVX512-BF16 or AMX. Other CPUs emulate bf16 and are slower than in fp32."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def on_accelerator(x: Tensor) -> bool:
    """Whether Triton runs where x is. Asked for as `device.on_accelerator(x)`, so that the tests
    in Triton's interpreter can say yes for a CPU, in one place."""
    return x.is_cuda


def launching_on(x: Tensor) -> AbstractContextManager[None]:
    """Around every launch: Triton launches on the current device, which need not be that of x."""
    return torch.cuda.device(x.device)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for reuse.

    By default every large tensor is mapped afresh from the kernel, which clears its pages: 12,000
    page faults per step of the demo, a tenth of its time. Elsewhere than on glibc nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of mallopt(3)
    libc = ctypes.CDLL("libc.so.6")
    for parameter, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**26)):
        libc.mallopt(parameter, value)
