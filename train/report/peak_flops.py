"""What a device could do at most, for the utilization (MFU): torchtitan's table, which is kept up
with the makers' data sheets."""

import torch

_A100 = 312e12
"""FLOP/s of an A100, which torchtitan 0.3.0 gives for every device that it does not know, too."""


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s of a CUDA device; None for a CPU and where nobody knows."""
    if device.type != "cuda":
        return None
    from torchtitan.tools.utils import get_peak_flops

    name = torch.cuda.get_device_name(device)
    peak = float(get_peak_flops(name))
    return None if peak == _A100 and "A100" not in name else peak
