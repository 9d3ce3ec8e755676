"""Rotary position embedding (RoFormer, arXiv:2104.09864) and its scaling to longer contexts.

Dimension i of a head is paired with dimension i + C/2 (Llama), or with its neighbor if
`interleaved` (DeepSeek, Llama 4). Angles and rotation are fp32: at position 10^5 bf16 angles would
be wrong by whole turns.

Scaling by a factor s lowers the frequencies of dimensions with slow rotation, so that their angles
at position s * n are those of position n in training; dimensions with fast rotation are unchanged.
YaRN (arXiv:2309.00071) interpolates between the two linearly over the dimensions, Llama 3.1 over
wavelengths. YaRN also sharpens attention by 0.1 ln(s) + 1, on cos and sin (the paper) or on the
logits (DeepSeek).

T tokens, H heads, C width of the rotated part.
"""

import math

import torch
from torch import Tensor

from configs.model import RopeConfig
from kernels.layers.rope import rotate


def rope_tables(positions_T: Tensor, rope: RopeConfig, dim: int) -> tuple[Tensor, Tensor]:
    """`cos` and `sin`, each fp32 `[T, dim / 2]`, for integer positions."""
    frequencies = inverse_frequencies(rope, dim, positions_T.device)
    angles = positions_T.float()[:, None] * frequencies
    scale = table_scale(rope)
    return angles.cos() * scale, angles.sin() * scale


def apply_rope(x_THC: Tensor, tables: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Rotate every head of `x_THC` by its token's angle; same shape and dtype."""
    return rotate(x_THC, *tables, interleaved)


def inverse_frequencies(rope: RopeConfig, dim: int, device: torch.device) -> Tensor:
    """Radians per position of every pair, fp32 `[dim / 2]`."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    plain = 1.0 / rope.theta**exponents
    if rope.scaling == "yarn":
        return _yarn(rope, dim, plain)
    if rope.scaling == "llama3":
        return _llama3(rope, plain)
    return plain


def table_scale(rope: RopeConfig) -> float:
    """Factor on cos and sin."""
    if rope.scaling != "yarn":
        return 1.0
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor, 1.0)


def logit_scale(rope: RopeConfig) -> float:
    """Factor on the attention logits; DeepSeek applies YaRN's scale here, squared for q and k."""
    if rope.scaling != "yarn" or not rope.mscale_all_dim:
        return 1.0
    return yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2


def yarn_mscale(factor: float, weight: float) -> float:
    """0.1 * weight * ln(factor) + 1 (arXiv:2309.00071, section 3.4)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(rope: RopeConfig, dim: int, plain: Tensor) -> Tensor:
    def pair_that_turns(rotations: float) -> float:
        turns = rope.original_length / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=plain.device)
    ramp = ((pairs - low) / (high - low)).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    turns = rope.original_length * plain / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    # Llama 4 Scout sets both to 1: a step instead of a ramp
    smooth = ((turns - low) / max(high - low, 1e-6)).clamp(0, 1)
    return plain / rope.factor * (1 - smooth) + plain * smooth
