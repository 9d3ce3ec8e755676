"""Interpreter tests: SwiGLU, plain and quantized, against its references."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8 import Quantized
from kernels.mlp import swiglu, swiglu_fp8_triton, swiglu_triton
from kernels.quantization.quantize import quantize_1x128_reference, quantize_128x1_reference
from tests.kernels.interpreted.lane import bits, kernels_on_cpu, relative

ACTIVATIONS: list[swiglu.Activation] = ["swiglu", "clamped_swiglu"]


def close(ours: Tensor, reference: Tensor) -> None:
    assert ours.dtype == reference.dtype and ours.shape == reference.shape
    if ours.numel():
        assert relative(ours, reference) < (1e-6 if ours.dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 1025), (0, 8), (4, 2300)], ids=str)
def test_swiglu(
    shape: tuple[int, int], activation: swiglu.Activation, weighted: bool, dtype: torch.dtype
) -> None:
    rows, width = shape
    gate_up, grad = 4 * torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)
    weights = torch.rand(rows) if weighted else None
    with kernels_on_cpu():
        h = swiglu.swiglu(gate_up, weights, activation)
        found = swiglu.swiglu_backward(grad, gate_up, weights, activation, True)
        without = swiglu.swiglu_backward(grad, gate_up, weights, activation)
    assert torch.equal(h, found[2]) and without[2].numel() == 0
    assert torch.equal(without[0], found[0]) and torch.equal(without[1], found[1])
    close(h, swiglu.swiglu_reference(gate_up, weights, activation))
    expected = swiglu.swiglu_backward_reference(grad, gate_up, weights, activation, True)
    for ours, reference in zip(found, expected, strict=True):
        close(ours, reference)


def test_what_is_clamped_and_what_is_not_a_number() -> None:
    gate = torch.tensor([8.0, 7.0, -9.0, 1.0, float("nan"), 1.0])
    up = torch.tensor([1.0, 7.0, -8.0, 9.0, 1.0, float("nan")])
    gate_up, grad = torch.cat([gate, up])[None], torch.ones(1, 6)
    with kernels_on_cpu():
        h = swiglu.swiglu(gate_up, activation="clamped_swiglu")
        found, _, _ = swiglu.swiglu_backward(grad, gate_up, None, "clamped_swiglu")
    assert h[0].isnan().tolist() == [False] * 4 + [True] * 2
    assert (found[0, :4] == 0).tolist() == [True, False, False, False]  # gate 8
    assert (found[0, 6:10] == 0).tolist() == [False, False, True, True]  # up -8 and 9
    assert found[0, [4, 5, 10]].isnan().all()  # the gradient of up does not depend on up


def test_swiglu_beyond_2_31() -> None:
    width, block = 2**29, 64
    gate_up = torch.randn(3, block).bfloat16()
    up = torch.randn(3, block).bfloat16()
    memory = torch.from_numpy(np.empty(3 * 2 * width * 2, np.uint8)).view(torch.bfloat16)
    rows = memory.as_strided((3, 2, block), (2 * width, width, 1))
    rows.copy_(torch.stack([gate_up, up], 1))
    out = torch.from_numpy(np.empty(3 * width * 2, np.uint8)).view(torch.bfloat16)
    swiglu_triton._forward[(3, 1)](memory, None, out, width, CLAMPED=False, BLOCK=block)
    reference = swiglu.swiglu_reference(torch.cat([gate_up, up], 1))
    assert relative(out.as_strided((3, block), (width, 1)), reference) < 2e-3


def same(ours: Quantized, reference: Quantized, rows: int | None = None) -> None:
    """Compare up to `rows`; rows after that are undefined. Both sides round the same fp32
    arithmetic, except that exp is from different libraries, so one value in some thousands rounds
    differently."""
    for a, b in zip(ours, reference, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert min(a.shape) < 2 or a.stride() == b.stride()
    data, expected = (x.data[:rows].float() for x in (ours, reference))
    if data.numel():
        assert relative(data, expected) < 3e-3
        assert (data != expected).float().mean() < 5e-3
        scales, expected = (x.scales[:rows] for x in (ours, reference))
        torch.testing.assert_close(scales, expected, rtol=1e-2, atol=0)
        assert torch.equal(scales == 0, expected == 0)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(33, 128), (1, 1), (40, 200), (0, 128)], ids=str)
def test_forward_quantised(
    shape: tuple[int, int], activation: swiglu.Activation, power_of_two: bool
) -> None:
    gate_up = 3 * torch.randn(shape[0], 2 * shape[1]).bfloat16()
    gate_up[2:3, -1] = float("inf")
    weights = torch.rand(shape[0]) if shape[1] > 100 else None
    with kernels_on_cpu():
        ours = swiglu.swiglu_quantized(gate_up, weights, activation, power_of_two)
        h = swiglu.swiglu(gate_up, weights, activation)
    expected = quantize_1x128_reference(h, power_of_two)
    for a, b in zip(ours, expected, strict=True):  # of the same h, bit by bit
        assert a.shape == b.shape and (min(a.shape) < 2 or a.stride() == b.stride())
        assert torch.equal(bits(a), bits(b))


GROUPS: dict[str, tuple[list[int], list[int]]] = {
    "uneven": ([130, 0, 1], [130, 0, 1]),
    "padded": ([160, 32], [150, 0]),
}


@pytest.mark.parametrize("width", [128, 72])
@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("groups", [None, *GROUPS])
def test_backward_quantised(groups: str | None, fp8: bool, width: int) -> None:
    activation: swiglu.Activation = "clamped_swiglu" if groups == "padded" else "swiglu"
    sizes, counts = GROUPS[groups] if groups else ([140], [140])
    ends, R = torch.tensor(sizes).cumsum(0), sum(sizes) + 9
    covered = int(ends[-1]) if groups else R
    grad, gate_up = torch.randn(R, width).bfloat16(), 3 * torch.randn(R, 2 * width).bfloat16()
    weights, at = torch.rand(R), (ends, torch.tensor(counts)) if groups else (None, None)
    grad[covered:] = float("nan")
    scales = None
    if fp8:
        gate_up, scales = quantize_1x128_reference(gate_up)
    arguments = (grad, gate_up, weights, activation, False, *at, scales)
    with kernels_on_cpu():
        ours = swiglu.swiglu_backward_quantized(*arguments)
    reference = swiglu.swiglu_backward_quantized_reference(*arguments)
    same(ours.gate_up_rows, reference.gate_up_rows, covered)
    for a, b in ((ours.gate_up_columns, reference.gate_up_columns),
                 (ours.h_columns, reference.h_columns)):  # fmt: skip
        data = [Quantized(x.data[:covered], x.scales) for x in (a, b)]
        same(Quantized(data[0].data, a.scales), Quantized(data[1].data, b.scales))
    close(ours.weights_R, reference.weights_R)
    assert not ours.weights_R[covered:].any()


def test_backward_quantised_is_backward_then_quantised() -> None:
    """Compare our two kernels bit by bit, with a width that needs several programs per row."""
    grad, gate_up = torch.randn(40, 256).bfloat16(), torch.randn(40, 512).bfloat16()
    with kernels_on_cpu():
        ours = swiglu.swiglu_backward_quantized(grad, gate_up, None, power_of_two=True)
        grad_gate_up, _, h = swiglu.swiglu_backward(grad, gate_up, None, with_h=True)
    assert torch.equal(
        bits(ours.gate_up_rows.data), bits(quantize_1x128_reference(grad_gate_up, True).data)
    )
    expected = [quantize_128x1_reference(x, True) for x in (grad_gate_up, h)]
    for a, b in zip((ours.gate_up_columns, ours.h_columns), expected, strict=True):
        assert torch.equal(bits(a.data), bits(b.data)) and torch.equal(a.scales, b.scales)
    assert ours.weights_R.numel() == 0


@triton.jit
def _places(ends_ptr, counts_ptr, out_ptr, n_groups, BLOCK: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.program_id(0)
    found = swiglu_fp8_triton._place(ends_ptr, counts_ptr, n_groups, block, BLOCK, GROUPS)
    for i in tl.static_range(3):
        tl.store(out_ptr + block * 3 + i, found[i])


@pytest.mark.parametrize("n_groups", [pytest.param(256, marks=pytest.mark.slow), 64, 50, 1])
def test_blocks_of_many_experts(n_groups: int) -> None:
    """Most groups have no row or one, as with many experts and few tokens."""
    counts = torch.arange(n_groups) % 2
    counts[n_groups // 2] = 140
    ends = ((counts + 3) // 4 * 4).cumsum(0)
    expected, start = [], 0
    for end, count in zip(ends.tolist(), counts.tolist(), strict=True):
        expected += [[first, start + count, end] for first in range(start, end, 128)]
        start = end
    blocks = int(ends[-1]) // 128 + n_groups
    out = torch.zeros(blocks, 3, dtype=torch.int64)
    _places[(blocks,)](
        ends.int(), counts, out, n_groups, BLOCK=128, GROUPS=triton.next_power_of_2(n_groups)
    )
    assert out[: len(expected)].tolist() == expected
    beyond = out[len(expected) :]
    assert (beyond[:, 2] <= beyond[:, 0]).all()  # it contains no row
