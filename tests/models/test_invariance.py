"""Training's forward pass of a token does not depend on other tokens in the batch.

Therefore a server can give the bits of training although it never computes the same batch.
"""

import pytest
import torch
from torch import Tensor

from configs.model import ModelConfig
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.init import initialize
from models.router import Router
from tests.models.families import FAMILIES


def logits(decoder: Decoder, tokens_BL: Tensor) -> Tensor:
    """`[B, L, V]`."""
    positions_BL = torch.arange(tokens_BL.shape[1]).expand(tokens_BL.shape)
    with torch.no_grad():
        out: Tensor = decoder(
            tokens_BL.flatten(), positions_BL.flatten(), DocumentAttention(positions_BL)
        )
    return out.unflatten(0, tokens_BL.shape)


def lively(config: ModelConfig, dtype: torch.dtype, seed: int = 0) -> Decoder:
    """Weights with which every part of the model affects the result."""
    torch.manual_seed(seed)
    decoder = Decoder(config)
    initialize(decoder, config, seed=0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.normal_(0, 0.3)
    decoder = decoder.to(dtype).eval()
    for module in decoder.modules():
        if isinstance(module, Router):
            module.float_bias()
    return decoder


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    # without a look-ahead MTP modules do not run: test_mtp.py
    [pytest.param(n, marks=[pytest.mark.slow] if n.endswith("mtp") else []) for n in FAMILIES],
)
def test_batch_and_length_do_not_matter(name: str, dtype: torch.dtype, every: bool) -> None:
    """every: every length for both parts of the batch; otherwise they alternate, so that each part
    has short and long ones, and multiples of 8 and others."""
    decoder = lively(FAMILIES[name], dtype)
    tokens_BL = torch.randint(0, 96, (3, 152))
    whole = logits(decoder, tokens_BL)
    rows = slice(0, 1), slice(1, 3)
    for turn, length in enumerate((8, 15, 37, 16, 127, 128, 149, 129)):
        for row in rows if every else rows[turn % 2 :][:1]:
            part = logits(decoder, tokens_BL[row, :length])
            assert torch.equal(part, whole[row, :length]), (length, row)


def test_long_sequences_too() -> None:
    """More than 512 queries are divided into pieces, and more than one block of keys is summed."""
    for dtype in (torch.float32, torch.bfloat16):
        decoder = lively(FAMILIES["gpt-oss"], dtype)
        tokens_BL = torch.randint(0, 96, (1, 1100))
        whole = logits(decoder, tokens_BL)
        for length in (500, 530, 1099):
            assert torch.equal(logits(decoder, tokens_BL[:, :length]), whole[:, :length])
