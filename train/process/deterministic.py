"""`train.deterministic`: the same bits in every run of the same experiment on the same machine.

torch is set to use algorithms without a random order of additions, and to raise an error where it
has none. cuBLAS needs a workspace of fixed size, and NCCL a fixed algorithm, because it otherwise
chooses by measured speed. Our Triton kernels have one order of additions in any case: they are not
tuned at run time, and their only atomic operation counts integers.

Attention: torch's FlashAttention has a backward pass with a fixed order of additions and uses it if
this is set; `models.documents` then computes all attention in bf16 with it. The ones of cuDNN and
of the memory-efficient kernel have none, so both are disabled: attention in fp32 uses torch's plain
kernel, which stores the scores.

What it cannot fix: another number or arrangement of ranks, another type of GPU, another version of
torch, CUDA or NCCL, and `torch.compile`, which may choose a kernel by measured speed.
"""

import os
from typing import Any

import torch

_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NCCL_PROTO": "Simple",
}


def use_deterministic_algorithms() -> None:
    """Set everything; call it before the first CUDA operation and before the ranks connect."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    # it would fill new tensors with NaN, to show reads of memory that was never written
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
