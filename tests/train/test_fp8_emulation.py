"""Emulated arithmetic: the emulated recipe equals the real one, and each variant computes as
documented."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.model import ModelConfig
from configs.precision import FP8Config
from kernels.layers.cross_entropy import linear_cross_entropy
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.fp8 import apply_fp8
from models.init import initialize
from scripts.fp8_products import decibels
from tests.models.families import FAMILIES
from train.fp8_emulation import (
    VARIANTS,
    e5m2_blocks,
    emulated,
    narrow_product,
    one_scale,
)


def gradients(model: Decoder) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (60,), generator=generator)
    positions = torch.cat([torch.arange(40), torch.arange(20)])

    def output(x_TD: Tensor, head_VD: Tensor) -> Tensor:
        return linear_cross_entropy(x_TD, head_VD, tokens, None)

    ahead = [(tokens, output)] * model.config.mtp_depth
    made = model(tokens, positions, DocumentAttention(positions[None]), output, ahead)
    (sum(made) if ahead else made).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def decoder(model: ModelConfig) -> Decoder:
    made = Decoder(replace(model, init_std=0.3))
    initialize(made, made.config, seed=1)
    apply_fp8(made, FP8Config(power_of_two=True))
    return made.train()


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    squares = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return math.sqrt(squares / sum(float(grad.square().sum()) for grad in expected.values()))


@pytest.mark.parametrize("family", ["qwen3", "glm4", "deepseek-v3-mtp", "gpt-oss", "llama4"])
def test_the_recipe_through_the_emulation_is_the_recipe(family: str) -> None:
    model = decoder(FAMILIES[family])
    expected = gradients(model)
    with emulated(VARIANTS["blockwise"]):
        found = gradients(model)
    assert distance(found, expected) < 1e-6  # fp32 sums in another order
    with emulated(VARIANTS["e5m2_gradients"]):
        assert distance(gradients(model), expected) > 0.05  # an error of 2^-3 instead of 2^-4
    with emulated(VARIANTS["per_tensor"]):
        assert distance(gradients(model), expected) > 0  # only small values have larger errors
    assert distance(gradients(model), expected) == 0


def test_one_scale_keeps_only_what_the_largest_leaves() -> None:
    whole = torch.tensor([[448.0, 2.0**-9, 2.0**-11], [17.0, 1.0, 0.3]])
    made = one_scale(whole[1:], 1, whole)
    assert made.tolist() == [[16.0, 1.0, 0.3125]]
    assert one_scale(whole[:1], 1, whole).tolist() == [[448.0, 2.0**-9, 0.0]]


@pytest.mark.parametrize("dim", [0, 1])
def test_e5m2_has_two_bits_of_mantissa(dim: int) -> None:
    x = torch.randn(150, 70, generator=torch.Generator().manual_seed(0))
    made = e5m2_blocks(x, dim, x)
    assert made.shape == x.shape
    mantissas = np.frexp(made[made != 0].abs().numpy())[0]
    assert set(np.unique(mantissas)) <= {0.5, 0.625, 0.75, 0.875}
    assert float((made - x).abs().max() / x.abs().max()) < 2**-3


def cut(value: float, bits: int) -> float:
    """Rounded toward zero to this many significant bits."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(math.trunc(math.ldexp(mantissa, bits)), exponent - bits)


def test_the_narrow_accumulator_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    # small integers: sums of 32 products are exact in fp32, so the loop has the same bits
    a = torch.randint(-7, 8, (3, 70), generator=generator).float()
    b = torch.randint(-7, 8, (70, 4), generator=generator).float() * 37
    made = narrow_product(a, b)
    for m in range(3):
        for n in range(4):
            total = 0.0
            for k in range(0, 70, 32):
                total = cut(total + float(a[m, k : k + 32] @ b[k : k + 32, n]), 14)
            assert float(made[m, n]) == total


def test_a_narrow_accumulator_needs_promotion() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(16, 4096, generator=generator)
    b = torch.rand(4096, 16, generator=generator)
    exact = a.double() @ b.double()
    whole = narrow_product(a, b).double()
    parts = zip(a.split(128, dim=1), b.split(128), strict=True)
    promoted = sum(narrow_product(x, y) for x, y in parts)
    assert isinstance(promoted, Tensor)
    error = float(((whole - exact) / exact).abs().max())
    # every step of 32 loses up to 2^-13 of the sum, 128 steps, half of it on average
    assert 2e-3 < error < 128 * 2**-13
    assert float(((promoted.double() - exact) / exact).abs().max()) < 4 * 2**-13


def test_each_arithmetic_loses_where_it_should() -> None:
    def db(name: str, kind: str) -> float:
        return decibels(VARIANTS[name], kind)

    for kind in ("normal", "gradients", "positive"):
        assert db("blockwise", kind) > 27  # two roundings to 4 significant bits
    # the 1 block of 32 with the outlier is lost, or everything
    assert db("blockwise", "outliers") > 20 and db("per_tensor", "outliers") < 6
    assert db("per_tensor", "gradients") < 5
    assert db("per_tensor", "normal") == pytest.approx(db("blockwise", "normal"), abs=1)
    # one bit of mantissa of one operand
    assert 3 < db("blockwise", "gradients") - db("e5m2_gradients", "gradients") < 7
    assert db("e5m2_gradients", "normal") == db("blockwise", "normal")
    assert db("narrow_accumulator", "positive") < db("blockwise", "positive") - 3
