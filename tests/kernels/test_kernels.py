"""Every public kernel against its reference: forward and each gradient, odd sizes, empty groups."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.layers.attention import document_attention, document_attention_reference
from kernels.layers.cross_entropy import (
    IGNORE,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from kernels.mlp.swiglu import swiglu, swiglu_reference

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
"""||difference|| / ||reference||: a few roundings of the dtype (2^-24 and 2^-9)."""


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Output and the gradient of every floating input, for a fixed random output gradient."""
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = function(*leaves)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    wanted = [x for x in leaves if x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, seed)]


def assert_close(ours: list[Tensor], reference: list[Tensor], tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(ours, reference, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)
        assert error <= tolerance, f"result {i}: {error}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(5, 14), (1, 2), (0, 6), (3, 130)], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_swiglu(shape: tuple[int, int], weighted: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(shape).to(dtype)] + ([torch.rand(shape[0])] if weighted else [])
    assert_close(gradients(swiglu, *inputs), gradients(swiglu_reference, *inputs), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "vocab"), [(13, 50), (1, 3), (1100, 1031)])  # 2 chunks
def test_linear_cross_entropy(tokens: int, vocab: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(tokens, 16).to(dtype), torch.randn(vocab, 16).to(dtype)
    targets = torch.randint(0, vocab, (tokens,))
    targets[::5] = IGNORE
    ours = gradients(lambda a, b: linear_cross_entropy(a, b, targets), x, w)
    # in bf16 the reference's own gradients go through bf16 logits
    reference = gradients(lambda a, b: linear_cross_entropy_reference(a, b, targets), x, w)
    assert_close(ours, reference, 3 * TOLERANCE[dtype])


def test_linear_cross_entropy_scales_in_fp32() -> None:
    """A loss scale that bf16 cannot represent must not be rounded to bf16."""
    torch.manual_seed(0)
    x = torch.randn(640, 64).bfloat16().requires_grad_()
    w = torch.randn(320, 64).bfloat16().requires_grad_()
    targets = torch.randint(0, 320, (640,))
    exact = torch.autograd.grad(linear_cross_entropy_reference(x.double(), w.double(), targets), w)[
        0
    ].double()
    scale = 0.701171875  # halfway between two bf16 values: rounding it gives an error of 2.8e-3
    plain, scaled = (
        torch.autograd.grad(linear_cross_entropy(x, w, targets) * factor, w)[0].double()
        for factor in (1.0, scale)
    )
    assert abs(float((scaled * exact).sum() / (plain * exact).sum()) / scale - 1) < 5e-4


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "length", "width", "v_width"),
    [(2, 4, 2, 17, 8, 8), (1, 3, 3, 1, 4, 5), (3, 6, 1, 64, 10, 6), (1, 2, 2, 600, 4, 3)],
)
def test_document_attention(
    batch: int, heads: int, groups: int, length: int, width: int, v_width: int, documents: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    shapes = (heads, width), (groups, width), (groups, v_width)
    q, k, v = (torch.randn(length, batch, *s).permute(1, 2, 0, 3).to(dtype) for s in shapes)
    mask = None
    if documents:
        document = (torch.rand(batch, length) < 0.3).cumsum(1)
        mask = (document[:, :, None] == document[:, None, :]).tril()
    ours = gradients(lambda a, b, c: document_attention(a, b, c, mask, 0.3), q, k, v)
    # the reference is exact: fp64 on the same operands
    exact = gradients(
        lambda a, b, c: document_attention_reference(a, b, c, mask, 0.3),
        q.double(),
        k.double(),
        v.double(),
    )
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        error = (a.double() - b).norm() / b.norm().clamp(min=1.0)  # one key: gradients are zero
        assert error <= 2 * TOLERANCE[dtype]
