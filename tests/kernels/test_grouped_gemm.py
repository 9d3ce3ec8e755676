"""Grouped products and grouped quantization on the CPU, against plain loops."""

import itertools
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import device
from kernels.fp8 import MIN_SCALE
from kernels.gemm import gemm_fp8
from kernels.gemm.gemm_fp8 import gemm_fp8_nt
from kernels.grouped_gemm import grouped_gemm as bf16
from kernels.grouped_gemm import grouped_gemm_fp8 as fp8
from kernels.quantization.quantize import (
    dequantize_128x1_grouped,
    dequantize_128x128,
    quantize_1x128,
    quantize_1x128_128x1,
    quantize_1x128_128x1_grouped,
    quantize_128x1,
    quantize_128x1_grouped,
    quantize_128x128,
)
from scripts.gpu_suite.harness import tile_difference
from tests.kernels.test_kernels import TOLERANCE, assert_close, gradients

DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
Sizes = list[tuple[int, int]]
"""For every group: the number of true rows and of zero rows after them."""
CASES: list[Sizes] = [
    [(3, 0), (0, 0), (5, 0)],
    [(1, 0)],
    [(0, 0), (0, 9), (7, 1), (2, 40)],
    [(64, 0), (1, 31), (63, 1)],
]


def groups(sizes: Sizes) -> tuple[Tensor, Tensor]:
    counts = torch.tensor([n for n, _ in sizes])
    return torch.tensor([n + zeros for n, zeros in sizes]).cumsum(0), counts


def rows_of(sizes: Sizes, width: int, beyond: int, dtype: torch.dtype) -> Tensor:
    """True rows, zero rows, and NaN past the last end."""
    parts = [t for n, zeros in sizes for t in (torch.randn(n, width), torch.zeros(zeros, width))]
    return torch.cat([*parts, torch.full((beyond, width), math.nan)]).to(dtype)


@DTYPES
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_products(sizes: Sizes, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ends, counts = groups(sizes)
    n_rows, E, N, K = int(ends[-1]), len(sizes), 17, 24
    x, dy = rows_of(sizes, K, 3, dtype), rows_of(sizes, N, 3, dtype)
    w = torch.randn(E, N, K).to(dtype)
    true = torch.zeros(len(x), dtype=torch.bool)
    for rows in bf16.true_rows(ends, counts):
        true[rows] = True
    for a, layout in ((x, "nt"), (dy, "nn")):
        ours = getattr(bf16, f"grouped_gemm_{layout}")(a, w, ends, counts)
        reference = getattr(bf16, f"grouped_gemm_{layout}_reference")(a, w, ends, counts)
        assert_close([ours[:n_rows]], [reference[:n_rows]], TOLERANCE[dtype])
        assert (ours[:n_rows][~true[:n_rows]] == 0).all()
    for out_dtype in {dtype, torch.float32}:
        ours = bf16.grouped_gemm_tn(dy, x, ends, counts, out_dtype)
        exact = bf16.grouped_gemm_tn_reference(dy, x, ends, counts, out_dtype)
        assert_close([ours], [exact], TOLERANCE[out_dtype])
        assert all(ours[e].abs().max() == 0 for e, (n, _) in enumerate(sizes) if n == 0)


@DTYPES
@pytest.mark.parametrize("sizes", [[3, 0, 5], [1], [0, 0, 7, 2], [64, 1, 63]], ids=str)
def test_gradients(sizes: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    counts = torch.tensor(sizes)
    x, w = torch.randn(sum(sizes), 24).to(dtype), torch.randn(len(sizes), 17, 24).to(dtype)
    ours = gradients(lambda a, b: bf16.grouped_gemm_nt(a, b, counts.cumsum(0), counts), x, w)

    def loop(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([part @ b[e].T for e, part in enumerate(a.split(sizes))])

    assert_close(ours, gradients(loop, x, w), TOLERANCE[dtype])
    frozen = torch.autograd.grad(
        bf16.grouped_gemm_nt(x.requires_grad_(), w, counts.cumsum(0), counts).sum(), x
    )
    assert frozen[0].shape == x.shape


def fp8_operands(sizes: Sizes, N: int, K: int, power_of_two: bool) -> dict[str, tuple[Any, ...]]:
    """Function, reference, operands, and the exact product of the quantized operands."""
    ends, counts = groups(sizes)
    x, dy = (rows_of(sizes, width, 2, torch.bfloat16) for width in (K, N))
    w, w_turned = quantize_128x128(torch.randn(len(sizes), N, K), power_of_two)
    wide = dequantize_128x128(*w).double()
    (x_rows, x_columns), (dy_rows, dy_columns) = (
        quantize_1x128_128x1_grouped(rows, ends, counts, power_of_two) for rows in (x, dy)
    )
    exact = {"nt": [], "nn": [], "tn": []}  # type: dict[str, list[Tensor]]
    by_group = [
        dequantize_128x1_grouped(*q, ends, counts).double() for q in (dy_columns, x_columns)
    ]
    for e, rows in enumerate(bf16.true_rows(ends, counts)):
        for layout, q, other in (("nt", x_rows, wide[e].T), ("nn", dy_rows, wide[e])):
            values = (
                q.data[rows].double()
                * q.scales[rows].repeat_interleave(128, 1)[:, : q.data.shape[1]].double()
            )
            exact[layout].append(values @ other)
        exact["tn"].append(by_group[0][rows].T @ by_group[1][rows])
    return {
        "nt": ((*x_rows, *w, ends, counts), torch.cat(exact["nt"])),
        "nn": ((*dy_rows, w_turned, w.scales, ends, counts), torch.cat(exact["nn"])),
        "tn": ((*dy_columns, *x_columns, ends, counts), torch.stack(exact["tn"])),
    }


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("sizes", [*CASES, [(200, 0), (0, 3), (130, 126)]], ids=str)
def test_fp8(sizes: Sizes, power_of_two: bool) -> None:
    """Also when the CPU multiplies in bf16, which is exact for powers of two."""
    torch.manual_seed(0)
    ends, counts = groups(sizes)
    true = torch.cat([torch.arange(r.start, r.stop) for r in bf16.true_rows(ends, counts)])
    zero = torch.ones(int(ends[-1]), dtype=torch.bool)
    zero[true] = False
    given = fp8_operands(sizes, 150, 40, power_of_two)
    for layout, fast_bf16 in itertools.product(given, (False, True)):
        operands, exact = given[layout]
        for name in (f"grouped_gemm_fp8_{layout}", f"grouped_gemm_fp8_{layout}_reference"):
            for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
                with mock.patch.object(device, "bf16_is_fast", return_value=fast_bf16):
                    out = getattr(fp8, name)(*operands, dtype)
                assert out.dtype == dtype
                if layout != "tn":
                    assert (out[: len(zero)][zero] == 0).all()
                    out = out[true]
                assert_close([out.double()], [exact], limit)


def test_bf16_products_only_of_powers_of_two() -> None:
    """The dense product too; bf16 is never used when a more precise result is requested."""
    torch.manual_seed(0)
    a, b = torch.randn(130, 200), torch.randn(60, 200)
    seen: list[torch.dtype] = []
    multiply = torch.mm

    def spy(*operands: Tensor, **options: Any) -> Tensor:
        seen.append(operands[0].dtype)
        return multiply(*operands, **options)

    with mock.patch.object(device, "bf16_is_fast", lambda _: True), mock.patch("torch.mm", spy):
        for power_of_two in (False, True):
            operands = *quantize_1x128(a, power_of_two), *quantize_128x128(b, power_of_two)[0]
            exact = gemm_fp8.gemm_fp8_nt_reference(*operands, torch.float32)
            assert tile_difference(gemm_fp8_nt(*operands), exact) < 3e-6
            gemm_fp8_nt(*operands, torch.float32)
        operands[1][0] = math.nan
        assert gemm_fp8_nt(*operands)[0].isnan().all()
    fast, slow = torch.bfloat16, torch.float32
    assert seen == [slow, slow, fast, slow, slow]


@pytest.mark.parametrize("power_of_two", [False, True])
def test_quantize_restarts_with_every_group(power_of_two: bool) -> None:
    """Each group gives the same result as alone; zero rows are multiplied as zeros, whatever they
    contain."""
    torch.manual_seed(0)
    sizes = [(130, 7), (0, 0), (0, 5), (128, 0), (1, 2)]
    ends, counts = groups(sizes)
    x = rows_of(sizes, 9, 4, torch.bfloat16)
    x[135:137] = 1e9
    data, scales = quantize_128x1_grouped(x, ends, counts, power_of_two)
    assert data.shape == x.shape and scales.shape == (len(x) // 128 + len(sizes), 9)
    assert data.stride() == (1, -(-len(x) // 16) * 16)
    start = block = 0
    for (n, zeros), end in zip(sizes, ends.tolist(), strict=True):
        alone = x[start:end].clone()
        alone[n:] = 0
        expected = quantize_128x1(alone, power_of_two)
        blocks = slice(block, block + len(expected.scales))
        assert torch.equal(data[start:end].float(), expected.data.float())
        assert torch.equal(scales[blocks], expected.scales) and zeros >= 0
        start, block = end, blocks.stop
    assert (scales[block:] == MIN_SCALE).all()
    rows, columns = quantize_1x128_128x1_grouped(x, ends, counts, power_of_two)
    assert torch.equal(columns.data.float(), data.float())
    assert torch.equal(columns.scales, scales)
    clean = x[: ends[-1]].clone()
    clean[130:137] = 0
    expected = quantize_1x128(clean, power_of_two)
    assert torch.equal(rows.data[: ends[-1]].float(), expected.data.float())
    assert torch.equal(rows.scales[: ends[-1]], expected.scales)


def test_quantize_of_experts() -> None:
    """Each weight is quantized separately, even if rows are no multiple of 128."""
    torch.manual_seed(0)
    w = torch.randn(3, 140, 33) * torch.tensor([1.0, 1e4, 1e-4])[:, None, None]
    (data, scales), turned = quantize_128x128(w)
    assert scales.shape == (3, 2, 1) and turned.stride() == (33 * 144, 1, 144)
    assert torch.equal(turned.float(), data.float())
    for e in range(3):
        alone, _ = quantize_128x128(w[e])
        assert torch.equal(data[e].float(), alone.data.float())
        assert torch.equal(scales[e], alone.scales)
        assert torch.equal(dequantize_128x128(data, scales)[e], dequantize_128x128(*alone))


group_sizes = st.lists(
    st.tuples(st.sampled_from([0, 0, 1, 2, 5, 33, 140]), st.sampled_from([0, 0, 1, 31, 40])),
    min_size=1, max_size=7,
)  # fmt: skip


@settings(deadline=None, derandomize=True, max_examples=25)
@given(sizes=group_sizes, N=st.integers(1, 140), K=st.integers(1, 140), beyond=st.integers(0, 5))
def test_any_groups(sizes: Sizes, N: int, K: int, beyond: int) -> None:
    """Compare products of both dtypes with a loop over the groups, in fp64."""
    torch.manual_seed(N * K)
    ends, counts = groups(sizes)
    x, dy = (rows_of(sizes, width, beyond, torch.float32) for width in (K, N))
    w = torch.randn(len(sizes), N, K)
    y, dx = bf16.grouped_gemm_nt(x, w, ends, counts), bf16.grouped_gemm_nn(dy, w, ends, counts)
    dw = bf16.grouped_gemm_tn(dy, x, ends, counts)
    (x_rows, x_columns), (dy_rows, dy_columns) = (
        quantize_1x128_128x1_grouped(rows, ends, counts) for rows in (x, dy)
    )
    quantized, turned = quantize_128x128(w)
    y8 = fp8.grouped_gemm_fp8_nt(*x_rows, *quantized, ends, counts, torch.float32)
    dx8 = fp8.grouped_gemm_fp8_nn(*dy_rows, turned, quantized.scales, ends, counts, torch.float32)
    dw8 = fp8.grouped_gemm_fp8_tn(*dy_columns, *x_columns, ends, counts, torch.float32)
    for e, rows in enumerate(bf16.true_rows(ends, counts)):
        wide, a, b = w[e].double(), x[rows].double(), dy[rows].double()
        for left, right, ours, eight in (
            (a, wide.T, y[rows], y8[rows]), (b, wide, dx[rows], dx8[rows]),
            (b.T, a, dw[e], dw8[e]),
        ):  # fmt: skip
            full, terms = left @ right, left.abs() @ right.abs()
            norm = full.norm().clamp(min=1e-30)
            assert (ours.double() - full).norm() / norm < 1e-5
            # two roundings to e4m3, each at most 2^-4 of a term
            assert (eight.double() - full).norm() <= 0.15 * terms.norm()
    outside = torch.ones(int(ends[-1]), dtype=torch.bool)
    for rows in bf16.true_rows(ends, counts):
        outside[rows] = False
    assert all((t[: len(outside)][outside] == 0).all() for t in (y, dx, y8, dx8))


@pytest.mark.parametrize(
    "run",
    [
        lambda x, w, e, c: bf16.grouped_gemm_nt(x[:0], w[:0], e[:0], c[:0]),
        lambda x, w, e, c: bf16.grouped_gemm_nt(x[:0], w, e * 0, c * 0),
        lambda x, w, e, c: bf16.grouped_gemm_tn(x[:0], x[:0], e * 0, c * 0),
        lambda x, w, e, c: quantize_128x1_grouped(x[:0], e * 0, c * 0).scales,
        lambda x, w, e, c: quantize_128x128(w[:0])[1],
    ],
)
def test_of_nothing(run: Callable[..., Tensor]) -> None:
    ends, counts = groups([(2, 0), (3, 0)])
    x, w = torch.randn(5, 8), torch.randn(2, 4, 8)
    real = run(x, w, ends, counts)
    fake = run(x.to("meta"), w.to("meta"), ends.to("meta"), counts.to("meta"))
    assert real.shape == fake.shape and (real.float() == real.float()).all()


def test_errors_say_what_would_be_right() -> None:
    ends, counts = groups([(2, 0), (3, 0)])
    x, w = torch.randn(5, 8), torch.randn(2, 4, 8)
    with pytest.raises(ValueError, match="nt: cannot sum over 7 and 8"):
        bf16.grouped_gemm_nt(x[:, :7], w, ends, counts)
    with pytest.raises(ValueError, match=r"ends and counts are \[1\] and \[2\], must be \[2\]"):
        bf16.grouped_gemm_nt(x, w, ends[:1], counts)
    with pytest.raises(ValueError, match="must be of one dtype"):
        bf16.grouped_gemm_nt(x, w.bfloat16(), ends, counts)
    with pytest.raises(ValueError, match=r"out_dtype is torch\.float16"):
        bf16.grouped_gemm_tn(x, x, ends, counts, torch.float16)
    with pytest.raises(ValueError, match="'cutlass', must be 'torch' or 'triton'"):
        bf16.grouped_gemm_nt(x, w, ends, counts, "cutlass")  # type: ignore[arg-type]
    rows, (square, _) = quantize_1x128(x), quantize_128x128(w)
    with pytest.raises(ValueError, match=r"scales of w are \[2, 1\], must be \[2, 1, 1\]"):
        fp8.grouped_gemm_fp8_nt(*rows, square.data, square.scales[:, 0], ends, counts)
    with pytest.raises(ValueError, match="must both be e4m3"):
        fp8.grouped_gemm_fp8_nt(x, rows.scales, *square, ends, counts)
    whole = quantize_1x128_128x1(x)[1]
    with pytest.raises(ValueError, match=r"must be \[2, 8\] in fp32: from quantize_128x1_grouped"):
        fp8.grouped_gemm_fp8_tn(*whole, *whole, ends, counts)
