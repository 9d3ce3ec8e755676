"""Interpreter tests: RMSNorm, RoPE and the losses of a chunk of tokens."""

import pytest
import torch
from torch import Tensor

from kernels.layers import cross_entropy, norm, norm_triton, rope
from kernels.layers.cross_entropy import FOREIGN, IGNORE, linear_cross_entropy
from tests.kernels.interpreted.lane import kernels_on_cpu, relative

DTYPES = [torch.float32, torch.bfloat16]


def close(ours: Tensor, reference: Tensor, factor: float = 1.0) -> None:
    assert ours.dtype == reference.dtype and ours.shape == reference.shape
    if ours.numel() and bool(reference.any()):
        tolerance = 1e-6 if ours.dtype == torch.float32 else 2e-3
        assert relative(ours, reference) < factor * tolerance


def apart(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows of a wider tensor, as a split returns them."""
    wide = torch.full((rows, width + 13), float("nan"))
    wide[:, 5 : width + 5] = torch.randn(rows, width)
    return wide.to(dtype)[:, 5 : width + 5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (70, 8), (9, 130), (3, 4100), (0, 8)], ids=str)
def test_norm(
    shape: tuple[int, int], weighted: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_triton, "_PROGRAMS", 2)  # several iterations per program
    x, grad = apart(*shape, dtype), apart(*shape, dtype)
    weight = torch.randn(shape[1]).to(dtype) if weighted else None
    y, rstd = norm.rms_norm_reference(x, weight, 1e-5)
    with kernels_on_cpu():
        ours = norm.rms_norm(x, weight, 1e-5)
        found = norm._rms_norm_backward(grad, x, weight, rstd)
        _, kept = norm._rms_norm(x, weight, 1e-5)
    close(ours, y)
    close(kept, rstd)
    expected = norm.rms_norm_backward_reference(grad, x, weight, rstd)
    scale = float(grad.float().norm()) if shape[1] > 1 else 0.0  # width 1: terms almost cancel
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if shape[1] > 1:
            close(a, b, 2)
        assert float((a.double() - b.double()).norm()) <= max(scale, 10) * 1e-2


def test_norm_of_heads_and_what_is_no_number() -> None:
    x = torch.randn(5, 3, 64).transpose(0, 1)  # cannot be viewed as rows
    x[1, 2, 7] = float("nan")
    with kernels_on_cpu():
        ours = norm.rms_norm(x, None, 1e-6)
    assert ours.shape == x.shape and ours.is_contiguous()
    assert ours[1, 2].isnan().all() and not ours[0].isnan().any()
    close(ours[0], norm.rms_norm_reference(x, None, 1e-6)[0][0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("inverse", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 2), (7, 3, 10), (33, 2, 64), (0, 2, 8)], ids=str)
def test_rotation(
    shape: tuple[int, int, int], interleaved: bool, inverse: bool, dtype: torch.dtype
) -> None:
    T, H, C = shape
    wide = torch.full((T, H, C + 6), float("nan"))
    wide[..., 4 : C + 4] = torch.randn(shape)
    x = wide.to(dtype)[..., 4 : C + 4]
    cos, sin = torch.randn(2, T, C // 2)
    with kernels_on_cpu():
        ours = rope.rotate(x, cos, sin, interleaved, inverse)
    assert ours.is_contiguous()
    close(ours, rope.rotate_reference(x, cos, sin, interleaved, inverse))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("words", [1, 50, 5000])
@pytest.mark.parametrize("z", [0.0, 1e-2])
def test_losses_of_tokens(words: int, z: float, dtype: torch.dtype) -> None:
    wide = torch.full((9, words + 3), float("nan"))
    wide[:, :words] = 3 * torch.randn(9, words)
    wide[3, : words // 2] = float("-inf")
    targets = torch.randint(0, words, (9,))
    targets[3] = words - 1
    targets[::4], targets[5] = IGNORE, FOREIGN
    whole = 2 + torch.randn(9).abs() if words == 50 else None
    for with_gradient in (True, False):
        ours, reference = (wide.to(dtype, copy=True)[:, :words] for _ in range(2))
        arguments = (targets, whole, z, with_gradient)
        with kernels_on_cpu():
            found = cross_entropy.token_losses_(ours, *arguments)
        expected = cross_entropy.token_losses_reference_(reference, *arguments)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, reference, rtol=2**-7, atol=2e-6)
        assert not with_gradient or (ours[::4] == 0).all()


@pytest.mark.parametrize("needs_grad", [True, False])
def test_whole_loss(needs_grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy._CHUNK_ELEMENTS, "cuda", 300)
    targets = torch.randint(0, 90, (11,))
    targets[4] = IGNORE
    results = []
    x, w = torch.randn(11, 16), torch.randn(90, 16)
    for here in (True, False):
        a, b = (leaf.clone().requires_grad_(needs_grad) for leaf in (x, w))
        if here:
            with kernels_on_cpu():
                loss = linear_cross_entropy(a, b, targets, None, 1e-3)
        else:
            loss = cross_entropy.linear_cross_entropy_reference(a, b, targets, 1e-3)
        grads = torch.autograd.grad(loss, (a, b)) if needs_grad else ()
        results.append([loss.detach(), *grads])
    for ours, reference in zip(*results, strict=True):
        close(ours, reference, 3)
