"""The peak FLOP/s of a device, for the utilization (MFU): torchtitan's table, which is maintained
from the makers' data sheets."""

import torch

_A100 = 312e12
"""FLOP/s of an A100, which torchtitan 0.3.0 also returns for every unknown device."""


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s of a CUDA device; None for a CPU and for unknown devices."""
    if device.type != "cuda":
        return None
    from torchtitan.tools.utils import get_peak_flops

    name = torch.cuda.get_device_name(device)
    peak = float(get_peak_flops(name))
    return None if peak == _A100 and "A100" not in name else peak
