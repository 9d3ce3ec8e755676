"""RMSNorm (arXiv:1910.07467): statistics in fp32, weight applied before rounding."""

import torch
from torch import Tensor, nn

from kernels.layers.norm import rms_norm


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last dimension, in the dtype of `x`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def l2_norm(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without a weight (Llama 4's QK-norm), in the dtype of `x`."""
    return rms_norm(x, None, eps)
