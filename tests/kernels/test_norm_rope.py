"""RMSNorm and RoPE on a CPU."""

from unittest import mock

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.layers import norm, norm_cpu
from kernels.layers.norm import rms_norm
from kernels.layers.rope import rotate

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""||difference|| / ||exact||: a few roundings of the dtype (2^-24 and 2^-9)."""


def close(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    assert ours.shape == exact.shape
    error = float((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30))
    assert error <= tolerance, error


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    lead=st.lists(st.integers(0, 9), min_size=1, max_size=3), width=st.integers(2, 150),
    weighted=st.booleans(), dtype=st.sampled_from([*TOLERANCE]), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_norm_and_its_gradients(
    lead: list[int], width: int, weighted: bool, dtype: torch.dtype, seed: int
) -> None:
    """The operator's reference; and the function, with rows that fill several pieces."""
    make = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(*lead, width, generator=make).to(dtype) for _ in range(2))
    weight = torch.randn(width, generator=make).to(dtype) if weighted else None
    exact = [leaf.double().requires_grad_() for leaf in (x, weight) if leaf is not None]
    expected = F.rms_norm(exact[0], (width,), exact[1] if weighted else None, 1e-5)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    y, rstd = norm._rms_norm(x, weight, 1e-5)
    close(y, expected.detach(), TOLERANCE[dtype])
    close(rms_norm(x, weight, 1e-5), expected.detach(), TOLERANCE[dtype])
    found = norm._rms_norm_backward(grad, x, weight, rstd)
    for ours, right in zip(found[: len(wanted)], wanted, strict=True):
        close(ours, right, TOLERANCE[dtype])
    assert weighted or found[1].numel() == 0
    leaves = [leaf.clone().requires_grad_() for leaf in (x, weight) if leaf is not None]
    with mock.patch.object(norm_cpu, "_PIECE", 4 * width):
        ours = rms_norm(leaves[0], leaves[1] if weighted else None, 1e-5)
        assert torch.equal(ours, rms_norm(x, weight, 1e-5))
        for mine, right in zip(torch.autograd.grad(ours, leaves, grad), wanted, strict=True):
            assert mine.dtype == dtype
            close(mine, right, TOLERANCE[dtype])


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """RoPE as one complex product per pair."""
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).mT
    if not len(x):
        return x.clone()  # an empty tensor has no complex view
    numbers = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)[:, None]
    y = torch.view_as_real(numbers)
    return y.flatten(-2) if interleaved else y.mT.flatten(-2)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    T=st.integers(0, 20), H=st.integers(1, 4), pairs=st.integers(1, 40), wider=st.integers(0, 3),
    interleaved=st.booleans(), dtype=st.sampled_from([*TOLERANCE]), grads=st.booleans(),
)  # fmt: skip
def test_rotation_and_its_gradient(
    T: int, H: int, pairs: int, wider: int, interleaved: bool, dtype: torch.dtype, grads: bool
) -> None:
    make = torch.Generator().manual_seed(T * 100 + pairs)
    wide, grad = (torch.randn(T, H, 2 * pairs + wider, generator=make).to(dtype) for _ in range(2))
    cos, sin = torch.randn(2, T, pairs, generator=make)
    x, grad = wide[..., wider:], grad[..., wider:]
    exact = x.double().requires_grad_()
    expected = turned(exact, cos.double(), sin.double(), interleaved)
    (wanted,) = torch.autograd.grad(expected, exact, grad.double())
    with torch.set_grad_enabled(grads):
        leaf = x.detach().requires_grad_(grads)
        ours = rotate(leaf, cos, sin, interleaved)
        close(ours.detach(), expected.detach(), TOLERANCE[dtype])
        assert ours.is_contiguous() and ours.dtype == dtype
        if grads:
            close(torch.autograd.grad(ours, leaf, grad)[0], wanted, TOLERANCE[dtype])
        close(rotate(grad, cos, sin, interleaved, inverse=True), wanted, TOLERANCE[dtype])
