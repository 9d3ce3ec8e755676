"""Interpreter tests: grouped products and grouped quantization against their references."""

import contextlib
import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import kernels.grouped_gemm.grouped_gemm_triton as triton_form
from kernels.fp8 import empty_column_major
from kernels.gemm.gemm_fp8_triton import TILES, Target, Tile
from kernels.group_schedule import schedule
from kernels.grouped_gemm import grouped_gemm, grouped_gemm_fp8
from kernels.quantization import quantize, quantize_triton
from tests.kernels.interpreted.lane import (
    DESCRIPTORS,
    FP8,
    POINTERS,
    assert_same_bits,
    hard_values,
    kernels_on_cpu,
    relative,
)

TARGETS = pytest.mark.parametrize(
    "target", [POINTERS, DESCRIPTORS], ids=["pointers", "descriptors"]
)
SMALL = Tile(rows=32, columns=32, warps=4, programs_per_sm=1, cost=1.0)
SMALL_FP8 = Tile(rows=32, columns=128, warps=4, programs_per_sm=1, cost=1.0)
BEYOND = 7
"""Rows past the last end."""


def groups(sizes: list[int], counts: list[int] | None = None) -> tuple[Tensor, Tensor]:
    counts = sizes if counts is None else counts
    return torch.tensor(sizes).cumsum(0), torch.tensor(counts, dtype=torch.int32)


def rows_of(width: int, ends: Tensor, counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Random true rows, followed by zero rows; NaN past the last end."""
    x = torch.full((int(ends[-1]) + BEYOND, width), math.nan)
    x[: ends[-1]] = 0
    for rows in grouped_gemm.true_rows(ends, counts):
        x[rows] = torch.randn(rows.stop - rows.start, width)
    return x.to(dtype)


CASES = [
    ([40, 0, 1, 75], [33, 0, 1, 75], 50, 70),
    ([0, 0, 3], [0, 0, 3], 1, 1),
    ([128, 96], [2, 0], 64, 40),  # tiles without true rows
    ([0], [0], 5, 6),
    ([1, 2] * 6, [1, 2] * 6, 16, 33),
]


@TARGETS
@pytest.mark.parametrize("layout", ["nt", "nn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("sizes", "counts", "N", "K"), CASES, ids=str)
def test_bf16_by_rows(
    sizes: list[int], counts: list[int], N: int, K: int, dtype: torch.dtype, layout: str,
    target: Target,
) -> None:  # fmt: skip
    ends, true = groups(sizes, counts)
    x, dy = rows_of(K, ends, true, dtype), rows_of(N, ends, true, dtype)
    w = torch.randn(len(sizes), N, K).to(dtype)
    last = int(ends[-1])
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3  # one rounding of the output
    if layout == "nt":
        a, b, reference = x, w, grouped_gemm.grouped_gemm_nt_reference(x, w, ends, true)
    else:
        a, b, reference = dy, w.mT, grouped_gemm.grouped_gemm_nn_reference(dy, w, ends, true)
    y = torch.empty(len(a), b.shape[1], dtype=dtype)
    triton_form.by_rows(a, None, b, None, ends, true, y, target, SMALL)
    assert last == 0 or relative(y[:last], reference[:last]) < tolerance
    zero = torch.ones(last, dtype=torch.bool)
    for rows in grouped_gemm.true_rows(ends, true):
        zero[rows] = False
    assert (y[:last][zero] == 0).all() and y[last:].isnan().all()  # not written


@TARGETS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("sizes", "counts", "N", "K"), CASES, ids=str)
def test_bf16_by_groups(
    sizes: list[int], counts: list[int], N: int, K: int, dtype: torch.dtype, target: Target
) -> None:
    ends, true = groups(sizes, counts)
    x, dy = rows_of(K, ends, true, dtype), rows_of(N, ends, true, dtype)
    exact = grouped_gemm.grouped_gemm_tn_reference(dy, x, ends, true, torch.float32)
    dw = torch.full(exact.shape, math.nan)
    triton_form.by_groups(dy, None, x, None, ends, true, dw, 1, target, SMALL)
    assert int(ends[-1]) == 0 or relative(dw, exact) < 1e-6
    assert all(dw[e].abs().max() == 0 for e, n in enumerate(counts) if n == 0)


def fp8_operands(
    sizes: list[int], counts: list[int], N: int, K: int, power_of_two: bool = False
) -> dict[str, tuple[Tensor, ...]]:
    """Arguments of the three products, with NaN wherever a product must not read."""
    ends, true = groups(sizes, counts)
    x, dy = (rows_of(width, ends, true, torch.float32) for width in (K, N))
    w = torch.randn(len(sizes), N, K) * 2.0 ** torch.randint(-9, 9, (len(sizes), N, 1))
    weight, turned = quantize.quantize_128x128(w, power_of_two)
    columns = []
    for rows in (dy, x):
        data, scales = quantize.quantize_128x1_grouped(rows, ends, true, power_of_two)
        data[ends[-1] :] = math.nan
        used = sum(math.ceil(size / 128) for size in sizes)
        scales[used:] = math.nan
        columns += [data, scales]
    return {
        "nt": (*quantize.quantize_1x128(x, power_of_two), *weight, ends, true),
        "nn": (*quantize.quantize_1x128(dy, power_of_two), turned, weight.scales, ends, true),
        "tn": (*columns, ends, true),
    }


FP8_CASES = [
    ([140, 0, 1, 37], [131, 0, 1, 37], 150, 200),
    ([0, 3], [0, 3], 1, 1),
    ([256, 128], [2, 128], 64, 144),
    ([1, 2] * 8, [1, 2] * 8, 16, 130),
    ([32, 144], [20, 144], 130, 48),
]


@TARGETS
@pytest.mark.parametrize("layout", ["nt", "nn"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str
)
@pytest.mark.parametrize(("sizes", "counts", "N", "K"), FP8_CASES, ids=str)
def test_fp8_by_rows(
    sizes: list[int], counts: list[int], N: int, K: int, dtype: torch.dtype, tolerance: float,
    layout: str, target: Target,
) -> None:  # fmt: skip
    operands, last = fp8_operands(sizes, counts, N, K), sum(sizes)
    a, scales_a, w, scales_w, ends, true = operands[layout]
    reference = getattr(grouped_gemm_fp8, f"grouped_gemm_fp8_{layout}_reference")
    exact = reference(*operands[layout], torch.float32)
    b, scales_b = (w, scales_w) if layout == "nt" else (w.mT, scales_w.mT)
    y = torch.empty(len(a), b.shape[1], dtype=dtype)
    triton_form.by_rows(a, scales_a, b, scales_b, ends, true, y, target, SMALL_FP8)
    assert relative(y[:last], exact[:last]) < tolerance and y[last:].isnan().all()


@TARGETS
@pytest.mark.parametrize(("sizes", "counts", "N", "K"), FP8_CASES, ids=str)
def test_fp8_by_groups(sizes: list[int], counts: list[int], N: int, K: int, target: Target) -> None:
    operands = fp8_operands(sizes, counts, N, K)["tn"]
    dy, scales_n, x, scales_k, ends, true = operands
    exact = grouped_gemm_fp8.grouped_gemm_fp8_tn_reference(
        dy, scales_n, x, scales_k, ends, true, torch.float32
    )
    for align in (1, 16, 128):
        if any(size % align for size in sizes):
            continue
        out = torch.full(exact.shape, math.nan)
        triton_form.by_groups(dy, scales_n, x, scales_k, ends, true, out, align, target, TILES[1])
        assert relative(out, exact) < 1e-6


def test_many_experts() -> None:
    """Tests more groups than a program of the schedule reads at once, most of them empty."""
    sizes = [0] * 131
    for e, size in ((0, 5), (63, 40), (128, 1), (129, 33), (130, 64)):
        sizes[e] = size
    ends, counts = groups(sizes)
    tiles = schedule(ends, counts, int(ends[-1]), 32, split=True)
    n_true, n_zero = tiles.tiles[0, :2].tolist()
    assert (n_true, n_zero) == (1 + 2 + 1 + 2 + 2, 0)
    assert tiles.tiles[1 : 1 + n_true, 0].tolist() == [0, 63, 63, 128, 129, 129, 130, 130]
    blocks = (torch.tensor(sizes) + 31) // 32
    assert tiles.first_E.tolist() == (blocks.cumsum(0) - blocks).tolist()
    x, w = rows_of(24, ends, counts, torch.bfloat16), torch.randn(131, 17, 24).bfloat16()
    reference = grouped_gemm.grouped_gemm_nt_reference(x, w, ends, counts)
    y = torch.empty(len(x), 17, dtype=torch.bfloat16)
    with mock.patch.object(triton_form, "schedule", return_value=tiles) as made:
        triton_form.by_rows(x, None, w, None, ends, counts, y, DESCRIPTORS, SMALL)
    assert made.call_args == mock.call(ends, counts, len(x), 32, split=True)
    assert relative(y[:-BEYOND], reference[:-BEYOND]) < 4e-3


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    "n_groups",
    # `test_many_experts` has more groups than a program reads at once
    [1, 7, pytest.param(130, marks=pytest.mark.slow)],
)
def test_schedule_covers_every_row_once(n_groups: int, split: bool) -> None:
    lengths = torch.randint(0, 90, (n_groups,))
    true = (lengths * torch.rand(n_groups)).long()
    ends = lengths.cumsum(0)
    made = schedule(ends, true, int(ends[-1]), 32, split)
    n_true, n_zero = made.tiles[0, :2].tolist()
    assert n_true + n_zero <= made.n_most
    starts = (ends - lengths).tolist()
    seen: list[int] = []
    for i, (expert, row, true_end, end) in enumerate(made.tiles[1:].tolist()):
        if i >= n_true + n_zero:
            assert (expert, row, true_end, end) == (0, 0, 0, 0)
            continue
        assert (row - starts[expert]) % 32 == 0 and end == int(ends[expert])
        assert true_end == starts[expert] + int(true[expert])
        assert not split or (row < true_end) == (i < n_true)
        seen += range(row, min(row + 32, end))
    assert sorted(seen) == list(range(int(ends[-1])))
    blocks = (lengths + 31) // 32
    assert made.first_E.tolist() == (blocks.cumsum(0) - blocks).tolist()


@TARGETS
def test_zero_rows_stay_zero(target: Target) -> None:
    """Output rows of zero rows are zero, whatever the weights and the other rows contain."""
    ends, counts = groups([40, 32], [33, 5])
    x = rows_of(24, ends, counts, torch.bfloat16)
    x[33:40] = x[45:72] = math.nan
    w = torch.full((2, 20, 24), math.inf).bfloat16()
    y = torch.empty(len(x), 20, dtype=torch.bfloat16)
    triton_form.by_rows(x, None, w, None, ends, counts, y, target, SMALL)
    assert (y[33:40] == 0).all() and (y[45:72] == 0).all() and not (y[:33] == 0).any()


@TARGETS
def test_a_neighbours_nan_stays_there(target: Target) -> None:
    """A group or weight full of NaN does not affect any other group's output, at any boundary."""
    sizes, N, K = [37, 70, 5], 40, 72
    ends, counts = groups(sizes)
    x, dy = (rows_of(width, ends, counts, torch.bfloat16) for width in (K, N))
    w = torch.randn(3, N, K).bfloat16()
    clean = grouped_gemm.grouped_gemm_nn_reference(dy, w, ends, counts)
    weight = w.clone()
    weight[1] = math.nan
    out = torch.empty(len(dy), K, dtype=torch.bfloat16)
    triton_form.by_rows(dy, None, weight.mT, None, ends, counts, out, target, SMALL)
    others = [*range(37), *range(107, 112)]
    assert relative(out[others], clean[others]) < 4e-3 and out[37:107].isnan().all()
    dy[37:107] = math.nan
    dw = torch.empty(3, N, K)
    triton_form.by_groups(dy, None, x, None, ends, counts, dw, 1, target, SMALL)
    assert dw[1].isnan().all() and not dw[[0, 2]].isnan().any()


@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(
    ("sizes", "counts", "D"),
    [([131, 0, 1, 140], [130, 0, 1, 5], 140), ([0], [0], 4), ([256, 128], [256, 0], 33)],
    ids=str,
)
def test_quantize_grouped(
    sizes: list[int], counts: list[int], D: int, power_of_two: bool, fp8: torch.dtype
) -> None:
    ends, true = groups(sizes, counts)
    last = int(ends[-1])
    x = hard_values(last + BEYOND, D, torch.bfloat16)
    x[last:] = math.nan  # never read
    made = quantize_triton.quantize_groups(x, fp8, power_of_two, True, True, (ends, true))
    alone = quantize_triton.quantize_groups(x, fp8, power_of_two, False, True, (ends, true))[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "fp8_dtype", lambda device: fp8)
        expected = quantize.quantize_1x128_128x1_grouped_reference(x, ends, true, power_of_two)
    for ours in (made[1], alone):
        assert ours is not None
        ours.data[last:] = 0  # undefined
        assert_same_bits(ours, expected[1])
    assert made[0] is not None
    for a, b in zip(made[0], expected[0], strict=True):
        assert_same_bits(type(made[0])(a[:last], a[:last]), type(made[0])(b[:last], b[:last]))


@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("shape", [(3, 130, 140), (2, 1, 5), (0, 3, 4), (1, 128, 128)], ids=str)
def test_quantize_experts(shape: tuple[int, ...], fp8: torch.dtype) -> None:
    """Each weight is quantized separately, even if its number of rows is no multiple of 128."""
    w = torch.randn(shape).bfloat16() * 2.0 ** torch.arange(shape[0])[:, None, None]
    ours, turned = quantize_triton.quantize_blocks(w, fp8, False)
    assert turned.shape == w.shape and (0 in shape or turned.stride(1) == 1)
    assert turned.stride(2) % 16 == 0
    for e in range(shape[0]):
        reference = quantize._reference(w[e], (128, 128), False, fp8)
        assert_same_bits(type(ours)(ours.data[e], ours.scales[e]), reference)
        assert torch.equal(turned[e].float(), reference.data.float())


def far_apart(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A copy in memory that is mostly never touched."""
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True)) + 4096
    memory = torch.from_numpy(np.empty(reach * x.element_size(), np.uint8)).view(x.dtype)
    return memory.as_strided(x.shape, strides).copy_(x)


def test_beyond_2_31() -> None:
    ends, counts = groups([2, 0, 0, 1])
    x, w = torch.randn(3, 40).bfloat16(), torch.randn(4, 9, 40).bfloat16()
    dy = torch.randn(3, 9).bfloat16()
    far_x = far_apart(x, (2**30, 1))
    far_w = far_apart(w, (2**30, 2**26, 1))
    y = far_apart(torch.zeros(3, 9).bfloat16(), (2**30, 1))
    triton_form.by_rows(far_x, None, far_w, None, ends, counts, y, POINTERS, SMALL)
    assert relative(y, grouped_gemm.grouped_gemm_nt_reference(x, w, ends, counts)) < 4e-3
    dw = far_apart(torch.zeros(4, 9, 40), (2**30, 2**26, 1))
    triton_form.by_groups(dy, None, far_x, None, ends, counts, dw, 1, POINTERS, SMALL)
    reference = grouped_gemm.grouped_gemm_tn_reference(dy, x, ends, counts, torch.float32)
    assert relative(dw, reference) < 1e-6


def test_the_public_functions_take_the_kernels() -> None:
    """Output and gradients of the bf16 product, and of all FP8 products, through the operations."""
    ends, counts = groups([40, 0, 30], [33, 0, 30])
    x = rows_of(48, ends, counts, torch.bfloat16)[:70]
    w, dy = torch.randn(3, 32, 48).bfloat16(), rows_of(32, ends, counts, torch.bfloat16)[:70]
    results = []
    choices: tuple[grouped_gemm.Implementation | None, ...] = ("triton", None)
    for implementation in choices:
        on_cpu = contextlib.nullcontext() if implementation is None else kernels_on_cpu()
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        with on_cpu:
            y = grouped_gemm.grouped_gemm_nt(leaves[0], leaves[1], ends, counts, implementation)
            found = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
            fp32 = grouped_gemm.grouped_gemm_tn(dy, x, ends, counts, torch.float32)
            results.append([*found, fp32])
    for ours, reference in zip(*results, strict=True):
        assert ours.dtype == reference.dtype and relative(ours, reference) < 4e-3
    for layout, operands in fp8_operands([40, 0, 30], [33, 0, 30], 32, 48).items():
        function = getattr(grouped_gemm_fp8, f"grouped_gemm_fp8_{layout}")
        reference = getattr(grouped_gemm_fp8, f"grouped_gemm_fp8_{layout}_reference")(*operands)
        with kernels_on_cpu():
            ours = function(*operands)
        last = len(ours) if layout == "tn" else 70
        assert relative(ours[:last], reference[:last]) < 4e-3


def test_other_memory_orders_are_copied() -> None:
    ends, counts = groups([20, 9])
    operands = fp8_operands([20, 9], [20, 9], 40, 56)
    a, scales_a, w, scales_w, *_ = operands["nn"]
    reference = grouped_gemm_fp8.grouped_gemm_fp8_nn_reference(
        a, scales_a, w, scales_w, ends, counts, torch.float32
    )
    y = torch.empty(len(a), 56)
    rows = empty_column_major(a.shape, a.dtype, a.device).copy_(a)
    triton_form.by_rows(
        rows, scales_a.contiguous(), w.contiguous().mT, scales_w.mT, ends, counts, y, DESCRIPTORS
    )
    assert relative(y[:29], reference[:29]) < 1e-6
