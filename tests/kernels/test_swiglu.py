"""SwiGLU's operations on a CPU: against autograd, and quantized."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.fp8 import MIN_SCALE, Quantized
from kernels.mlp.swiglu import Activation, swiglu, swiglu_backward, swiglu_backward_quantized
from kernels.quantization.quantize import dequantize_1x128, quantize_1x128, quantize_128x1

ACTIVATIONS: list[Activation] = ["swiglu", "clamped_swiglu"]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
"""||difference|| / ||exact||: a few roundings of the dtype (2^-24 and 2^-9)."""


def definition(gate_up: Tensor, weights: Tensor | None, activation: str) -> Tensor:
    """SwiGLU as in the papers and GPT-OSS's published code, in the dtype of its inputs."""
    gate, up = gate_up.chunk(2, -1)
    if activation == "swiglu":
        h = F.silu(gate) * up
    else:
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        h = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return h if weights is None else h * weights[:, None]


def close(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    assert ours.shape == exact.shape
    error = float((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30))
    assert error <= tolerance, error


def inputs(
    rows: int, width: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    gate_up = 4 * torch.randn(rows, 2 * width, generator=make)  # a tenth beyond the limit
    grad = torch.randn(rows, width, generator=make)
    return gate_up.to(dtype), torch.rand(rows, generator=make), grad.to(dtype)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    rows=st.integers(0, 70), width=st.integers(1, 140), weighted=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS), dtype=st.sampled_from([*TOLERANCE]),
    seed=st.integers(0, 2**20),
)  # fmt: skip
def test_both_forms_and_their_gradients(
    rows: int, width: int, weighted: bool, activation: Activation, dtype: torch.dtype, seed: int
) -> None:
    gate_up, weights, grad = inputs(rows, width, dtype, seed)
    leaves = [gate_up, weights][: 1 + weighted]
    exact = [x.double().requires_grad_() for x in leaves]
    expected = definition(exact[0], exact[1] if weighted else None, activation)
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    leaves = [x.clone().requires_grad_() for x in leaves]
    h = swiglu(leaves[0], leaves[1] if weighted else None, activation)
    found = [h, *torch.autograd.grad(h, leaves, grad)]
    for ours, right in zip(found, wanted, strict=True):
        close(ours.detach(), right.detach(), TOLERANCE[dtype])
    again = swiglu_backward(grad, gate_up, weights if weighted else None, activation, True)[2]
    torch.testing.assert_close(again, h.detach(), rtol=2**-7, atol=1e-30)


def test_what_is_clamped_has_no_gradient() -> None:
    gate_up = torch.tensor([[8.0, 7.0, -9.0, 1.0, 1.0, 7.0, -8.0, 9.0]])
    found, _, _ = swiglu_backward(torch.ones(1, 4), gate_up, None, "clamped_swiglu")
    assert (found[0] == 0).tolist() == [True, False, False, False, False, False, True, True]


def columns_by_loop(x: Tensor, sizes: list[int], counts: list[int]) -> Quantized:
    """Each group quantized separately, and concatenated."""
    data, scales = torch.zeros(x.shape, dtype=torch.float8_e4m3fn), []
    start = 0
    for size, count in zip(sizes, counts, strict=True):
        group = x[start : start + size].clone()
        group[count:] = 0
        found = quantize_128x1(group)
        data[start : start + size] = found.data
        scales.append(found.scales)
        start += size
    unused = x.shape[0] // 128 + len(sizes) - sum(map(len, scales))
    return Quantized(data, torch.cat([*scales, torch.full((unused, x.shape[1]), MIN_SCALE)]))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    groups=st.lists(st.tuples(st.integers(0, 200), st.floats(0, 1)), min_size=1, max_size=6),
    beyond=st.integers(0, 40), width=st.sampled_from([1, 40, 128]), fp8=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_backward_quantised(
    groups: list[tuple[int, float]], beyond: int, width: int, fp8: bool, activation: Activation,
    seed: int,
) -> None:  # fmt: skip
    sizes, counts = [n for n, _ in groups], [round(n * share) for n, share in groups]
    covered = sum(sizes)
    gate_up, weights, grad = inputs(covered + beyond, width, torch.bfloat16, seed)
    true_rows, start = torch.zeros(covered + beyond, dtype=torch.bool), 0
    for size, count in zip(sizes, counts, strict=True):
        true_rows[start : start + count] = True
        start += size
    grad[~true_rows] = float("nan")  # never read
    scales = None
    if fp8:
        gate_up, scales = quantize_1x128(gate_up)
    found = swiglu_backward_quantized(
        grad, gate_up, weights, activation, ends_E=torch.tensor(sizes).cumsum(0),
        counts_E=torch.tensor(counts), scales=scales,
    )  # fmt: skip
    plain = gate_up if scales is None else dequantize_1x128(gate_up, scales)
    clean = grad.masked_fill(~true_rows[:, None], 0)
    grad_gate_up, grad_weights, h = swiglu_backward(clean, plain, weights, activation, True)
    assert torch.equal(found.weights_R, grad_weights)
    rows = quantize_1x128(grad_gate_up)
    assert torch.equal(found.gate_up_rows.data[:covered].float(), rows.data[:covered].float())
    assert torch.equal(found.gate_up_rows.scales[:covered], rows.scales[:covered])
    for ours, x in ((found.gate_up_columns, grad_gate_up), (found.h_columns, h)):
        expected = columns_by_loop(x, sizes, counts)
        assert torch.equal(ours.data[:covered].float(), expected.data[:covered].float())
        assert torch.equal(ours.scales, expected.scales)
        assert ours.data.shape[0] < 2 or ours.data.stride(1) % 16 == 0


def test_without_groups_all_rows_are_one() -> None:
    gate_up, weights, grad = inputs(300, 128, torch.bfloat16)
    found = swiglu_backward_quantized(grad, gate_up, weights)
    grad_gate_up, _, h = swiglu_backward(grad, gate_up, weights, with_h=True)
    for ours, x in ((found.gate_up_columns, grad_gate_up), (found.h_columns, h)):
        for a, b in zip(ours, quantize_128x1(x), strict=True):
            assert a.shape == b.shape and a.stride() == b.stride()
            assert torch.equal(a.float(), b.float())


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match='activation \'gelu\': use "swiglu" or "clamped_swiglu"'):
        swiglu(torch.ones(1, 2), None, "gelu")  # type: ignore[arg-type]
