"""Initial weights that do not depend on the number of ranks.

Every parameter has a separate generator, seeded by (seed, name) and, for experts, by the expert
index; so a rank that holds experts 8 to 15 draws only those, and every mesh starts from the same
model. The distribution is a truncated normal of `init_std`, divided by sqrt(2 * n_layers) for
projections that write into the residual stream (GPT-2); norms start at one, biases and sinks at
zero (`models.parameters`).
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from configs.model import ModelConfig
from models.parameters import spec_of


def initial_value(
    config: ModelConfig,
    seed: int,
    name: str,
    shape: tuple[int, ...],
    rows: slice = slice(None),
) -> Tensor:
    """Rows `rows` (first dimension) of the initial value of parameter `name`: fp32, on the CPU.

    shape: the whole logical shape. Of expert parameters only the requested experts are drawn.
    """
    spec = spec_of(name)
    if spec.init == "ones":
        return torch.ones(shape)[rows]
    if spec.init == "zeros":
        return torch.zeros(shape)[rows]
    std = config.init_std
    if spec.init == "residual":
        std /= math.sqrt(2 * config.n_layers)
    if spec.ep is None:
        return draw(seed, name, shape, std)[rows]
    wanted = range(shape[0])[rows]
    if not wanted:
        return torch.empty(0, *shape[1:])
    return torch.stack([draw(seed, f"{name}/{e}", shape[1:], std) for e in wanted])


def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill an unsharded model in place; buffers become zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(config, seed, name, tuple(parameter.shape)))
        for buffer in model.buffers():
            buffer.zero_()


def draw(seed: int, name: str, shape: tuple[int, ...], std: float) -> Tensor:
    """A tensor of the truncated normal that belongs to (seed, name)."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    value = torch.empty(shape)
    nn.init.trunc_normal_(value, std=std, a=-3 * std, b=3 * std, generator=generator)
    return value
