"""Rotary position embedding (RoFormer, arXiv:2104.09864), in the half-split layout of Llama.

Dimension i of a head is paired with dimension i + head_dim / 2. Angles and rotation are fp32: at
position 10^5 bf16 angles would be wrong by whole turns.
T tokens, H heads, C head width.
"""

import torch
from torch import Tensor


def rope_tables(positions_T: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """`cos` and `sin`, each fp32 `[T, head_dim / 2]`, for integer positions."""
    exponents = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32)
    angles = positions_T.float()[:, None] * theta ** (-exponents / head_dim)
    return angles.cos(), angles.sin()


def apply_rope(x_THC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every head of `x_THC` by its token's angle; same shape and dtype."""
    low, high = x_THC.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([low * cos - high * sin, low * sin + high * cos], dim=-1).to(x_THC.dtype)
