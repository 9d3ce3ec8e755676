"""The dtype of forward and backward for `precision.recipe` on a device."""

import torch

from configs.schema import JobConfig
from kernels.device import bf16_is_fast


def compute_dtype(config: JobConfig, device: torch.device, is_here: bool = True) -> torch.dtype:
    """bf16 or fp32. is_here: a CUDA device that is not present is assumed to be fast in bf16."""
    recipe = config.precision.recipe
    if recipe in ("bf16", "fp32"):
        return torch.bfloat16 if recipe == "bf16" else torch.float32
    assumed = device.type == "cuda" and not is_here
    return torch.bfloat16 if assumed or bf16_is_fast(device) else torch.float32
