"""The fraction of a model's work in FP8, against the products that torch runs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from configs.model import ModelConfig
from configs.precision import FP8Config
from kernels.grouped_gemm.grouped_gemm import true_rows
from kernels.layers.cross_entropy import linear_cross_entropy
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.fp8 import apply_fp8, gemm_shares
from models.init import initialize
from tests.models.families import FAMILIES, QWEN3

TOKENS = 64


class Fp8Flops(TorchDispatchMode):
    """Counts 2 M N K of every product of FP8 operands."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func)
        if name.startswith("phalanx.gemm_fp8"):
            layout, a, _, b, *_ = args
            summed, other = (0, 1) if layout == "tn" else (1, 0)
            n = b.shape[0 if layout == "nt" else 1]
            self.total += 2 * a.shape[summed] * a.shape[other] * n
        elif name.startswith("phalanx.grouped_gemm_fp8"):
            a, _, b, _, ends_E, counts_E = args[:6]
            rows = sum(part.stop - part.start for part in true_rows(ends_E, counts_E))
            per_row = a.shape[1] * b.shape[1] if "_tn" in name else b.shape[1] * b.shape[2]
            self.total += 2 * rows * per_row
        return func(*args, **(kwargs or {}))


def flops_that_ran(model: Decoder) -> int:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (TOKENS,), generator=generator)
    positions = torch.arange(TOKENS)

    def output(x_TD: Tensor, head_VD: Tensor) -> Tensor:
        return linear_cross_entropy(x_TD, head_VD, tokens, None)

    ahead = [(tokens, output)] * model.config.mtp_depth
    counter = Fp8Flops()
    with counter:
        made = model(tokens, positions, DocumentAttention(positions[None]), output, ahead)
        (sum(made) if ahead else made).backward()
    return counter.total


def decoder(model: ModelConfig) -> Decoder:
    made = Decoder(replace(model, init_std=0.3))
    initialize(made, made.config, seed=1)
    return made.train()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param(family, options, marks=[pytest.mark.slow] * ((i + j) % 2))
        for i, family in enumerate(FAMILIES)
        for j, options in enumerate([FP8Config(), FP8Config(keep=("*.wo",), first_bf16=1)])
    ],
)
def test_the_share_is_what_runs(family: str, options: FP8Config) -> None:
    model = decoder(FAMILIES[family])
    assert gemm_shares(model, TOKENS).fp8 == 0 == flops_that_ran(model)
    apply_fp8(model, options)
    shares = gemm_shares(model, TOKENS)
    assert flops_that_ran(model) == pytest.approx(shares.fp8 * TOKENS, rel=1e-12)
    assert (shares.fp8 == shares.eligible) == (not options.keep)
    assert shares.eligible < shares.every


def test_the_line_says_both() -> None:
    model = decoder(QWEN3)
    apply_fp8(model, FP8Config(keep=("*.experts",)))
    shares = gemm_shares(model, TOKENS)
    said = str(shares)
    assert f"{shares.fp8 / shares.eligible:.1%}" in said
    assert f"{shares.fp8 / shares.every:.1%}" in said
