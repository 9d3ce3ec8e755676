"""Interpreter tests: quantization and the FP8 products against their references."""

import contextlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import kernels.gemm.gemm_fp8_triton as gemm_triton
import kernels.quantization.quantize_triton as quantize_triton
from kernels.fp8 import Quantized, empty_column_major
from kernels.gemm import gemm_fp8
from kernels.gemm.gemm_fp8_triton import TILES, Target, Tile
from kernels.gemm.linear_fp8 import Fp8Weight, linears_fp8, linears_fp8_reference
from kernels.quantization import quantize
from kernels.quantization.shard import copy_column_major
from kernels.quantization.transpose_triton import to_row_major
from tests.kernels.interpreted.lane import (
    DESCRIPTORS,
    FP8,
    POINTERS,
    assert_same_bits,
    bits,
    hard_values,
    kernels_on_cpu,
    relative,
)


@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((131, 300), torch.bfloat16), ((131, 140), torch.float32), ((1, 1), torch.float16),
     ((33, 128), torch.float32), ((0, 5), torch.bfloat16), ((5, 0), torch.bfloat16)],
    ids=str,
)  # fmt: skip
def test_quantize(
    shape: tuple[int, int], dtype: torch.dtype, power_of_two: bool, fp8: torch.dtype
) -> None:
    x = hard_values(*shape, dtype)
    by_row = quantize._reference(x, (1, 128), power_of_two, fp8)
    by_column = quantize._reference(x, (128, 1), power_of_two, fp8)
    for rows, columns in ((True, False), (False, True), (True, True)):
        ours = quantize_triton.quantize_groups(x, fp8, power_of_two, rows, columns)
        for got, reference, wanted in zip(ours, (by_row, by_column), (rows, columns), strict=True):
            assert (got is not None) == wanted
            if got is not None:
                assert_same_bits(got, reference)
    block, transposed = quantize_triton.quantize_blocks(x[None], fp8, power_of_two)
    block, transposed = Quantized(*(part[0] for part in block)), transposed[0]
    assert_same_bits(block, quantize._reference(x, (128, 128), power_of_two, fp8))
    assert torch.equal(bits(transposed), bits(block.data))
    assert 0 in shape or transposed.stride(0) == 1


@pytest.mark.parametrize("E", [1, 3])
@pytest.mark.parametrize("R", [1, 16, 130])
@pytest.mark.parametrize("K", [1, 16, 131])
def test_transposed_copy(E: int, R: int, K: int) -> None:
    """Of matrices with gaps between them and between their columns."""
    bytes_ = torch.randint(0, 256, (E, K + 2, R + 5), dtype=torch.uint8)
    x = bytes_[:, :K, :R].mT.view(torch.float8_e4m3fn)
    ours = to_row_major(x).view(torch.uint8)
    assert ours.shape == (E, R, -(-K // 16) * 16) and ours.is_contiguous()
    assert torch.equal(ours[..., :K], bytes_[:, :K, :R].mT)
    assert not ours[..., K:].any()
    data = bytes_[:, :K, :R].contiguous().view(torch.float8_e4m3fn)
    out = empty_column_major(data.shape, data.dtype, data.device)
    with kernels_on_cpu():
        copy_column_major(data, out)
    assert torch.equal(bits(out), bits(data))


def test_quantize_divides_exactly() -> None:
    """Quotients near every rounding boundary of e4m3, where an error of one fp32 ulp changes the
    result."""
    codes = torch.arange(126, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    boundaries = (codes[1:] + codes[:-1]) / 2
    for scale in (1 + torch.rand(40)).tolist():
        exact = boundaries * torch.tensor(scale)
        x = torch.cat([exact.view(torch.int32).add(i).view(torch.float32) for i in range(-3, 4)])
        x = torch.cat([x, -x]).view(-1, 125)
        x = torch.cat([x, torch.full((len(x), 1), 448 * scale)], 1)  # sets the scale
        ours, _ = quantize_triton.quantize_groups(x, FP8[0], False, True, False)
        assert ours is not None
        assert_same_bits(ours, quantize.quantize_1x128_reference(x))


def test_quantize_noncontiguous() -> None:
    wide = torch.randn(70, 400)
    for x in (wide[:, 3:250], wide.T):
        ours, _ = quantize_triton.quantize_groups(x, FP8[0], False, True, False)
        assert ours is not None
        assert_same_bits(ours, quantize.quantize_1x128_reference(x))


def far_apart(rows: Tensor, stride: int) -> Tensor:
    """A copy with rows `stride` elements apart, in memory that is mostly never touched."""
    size = rows.element_size()
    codes = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]
    untouched = torch.from_numpy(np.empty(((len(rows) - 1) * stride + 4096) * size, np.uint8))
    x = untouched.view(rows.dtype).as_strided(rows.shape, (stride, 1))
    x.view(codes).copy_(rows.view(codes))
    return x


def test_quantize_beyond_2_31() -> None:
    x = torch.randn(3, 200).bfloat16()
    ours, _ = quantize_triton.quantize_groups(far_apart(x, 2**30), FP8[0], False, True, False)
    assert ours is not None
    assert_same_bits(ours, quantize.quantize_1x128_reference(x))
    transposed = far_apart(torch.zeros(3, 40, dtype=FP8[0]), 2**30).T  # [40, 3]
    scales = torch.empty(1, 3)
    quantize_triton._groups[(1, 1)](
        torch.randn(40, 3), None, None, transposed, scales, None, 40, 3, 3, 0, 2**30,
        LARGEST=448.0, SMALLEST_SCALE=2.0**-80, POWER_OF_TWO=False, TILE=128, STRIP=32, BLOCK=128,
        ENTRY=4,
    )  # fmt: skip
    assert transposed.float().abs().amax(0).tolist() == [448.0] * 3


def operands(M: int, N: int, K: int, fp8: torch.dtype = FP8[0]) -> dict[str, tuple[Tensor, ...]]:
    """Arguments of the three products, all from the same a `[M, K]` and b `[N, K]`."""
    a, b = torch.randn(M, K), torch.randn(N, K) * 2.0 ** torch.randint(-9, 9, (N, 1))
    rows = quantize._reference(a, (1, 128), False, fp8)
    weight = quantize._reference(b, (128, 128), False, fp8)
    other_way = empty_column_major((K, N), fp8, a.device).copy_(weight.data.T)
    columns = [quantize._reference(x.T, (128, 1), False, fp8) for x in (a, b)]
    return {
        "nt": (*rows, *weight),
        "nn": (*rows, other_way, weight.scales.T),
        "tn": (*columns[0], *columns[1]),
    }


def launch(layout: str, arguments: tuple[Tensor, ...], c: Tensor, target: Target,
           tile: Tile | None = None) -> Tensor:  # fmt: skip
    a, scales_a, b, scales_b = arguments
    if layout == "tn":
        a, scales_a = a.T, scales_a.T
    if layout != "nt":
        b, scales_b = b.T, scales_b.T
    gemm_triton.gemm(a, scales_a, b, scales_b, c, target, tile)
    return c


REFERENCES: dict[str, Callable[..., Tensor]] = {
    "nt": gemm_fp8.gemm_fp8_nt_reference,
    "nn": gemm_fp8.gemm_fp8_nn_reference,
    "tn": gemm_fp8.gemm_fp8_tn_reference,
}


@pytest.mark.parametrize("layout", REFERENCES)
@pytest.mark.parametrize("target", [POINTERS, DESCRIPTORS], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("M, N, K", [(140, 260, 300), (620, 129, 64), (1, 1, 1)])
def test_gemm(layout: str, target: Target, tile: Tile, M: int, N: int, K: int) -> None:
    """Tests 620 rows, which are more than one group of 8 tiles."""
    arguments = operands(M, N, K)[layout]
    reference = REFERENCES[layout](*arguments, torch.float32)
    ours = launch(layout, arguments, torch.empty(M, N), target, tile)
    assert relative(ours, reference) < 1e-6  # fp32 sums in another order


@pytest.mark.parametrize("layout", REFERENCES)
def test_gemm_rounds_once(layout: str) -> None:
    M, N, K = 130, 70, 200
    arguments = operands(M, N, K)[layout]
    exact = launch(layout, arguments, torch.empty(M, N), DESCRIPTORS)
    rounded = torch.empty(M, N, dtype=torch.bfloat16)
    assert torch.equal(launch(layout, arguments, rounded, POINTERS), exact.bfloat16())


@pytest.mark.parametrize("layout", REFERENCES)
@pytest.mark.parametrize("target", [POINTERS, DESCRIPTORS], ids=["pointers", "descriptors"])
def test_gemm_of_other_memory_orders(layout: str, target: Target) -> None:
    """Row-major and unaligned data, and row-major scales, are correct too."""
    arguments = operands(70, 200, 137)[layout]
    reference = REFERENCES[layout](*arguments, torch.float32)
    plain = tuple(x.contiguous() for x in arguments)
    ours = launch(layout, plain, torch.empty(70, 200), target)
    assert relative(ours, reference) < 1e-6


@pytest.mark.parametrize("fp8", FP8[1:], ids=str)
def test_gemm_fnuz(fp8: torch.dtype) -> None:
    for layout, arguments in operands(130, 140, 200, fp8).items():
        ours = launch(layout, arguments, torch.empty(130, 140), POINTERS)
        assert relative(ours, REFERENCES[layout](*arguments, torch.float32)) < 1e-6


def test_gemm_keeps_nan_where_it_belongs() -> None:
    a, b = torch.randn(140, 300), torch.randn(200, 300)
    a[3, 5] = b[130, 299] = math.inf
    rows, (weight, _) = quantize.quantize_1x128(a), quantize.quantize_128x128(b)
    ours = launch("nt", (*rows, *weight), torch.empty(140, 200), DESCRIPTORS)
    expected = torch.zeros(140, 200, dtype=torch.bool)
    expected[3] = expected[:, 128:] = True
    assert torch.equal(ours.isnan(), expected)


def test_gemm_beyond_2_31() -> None:
    a, scales_a, b, scales_b = operands(3, 3, 256)["nt"]
    c = far_apart(torch.zeros(3, 3, dtype=torch.bfloat16), 2**30)
    launch("nt", (far_apart(a, 2**30), scales_a, far_apart(b, 2**30), scales_b), c, POINTERS)
    assert relative(c, gemm_fp8.gemm_fp8_nt_reference(a, scales_a, b, scales_b)) < 1e-2


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(1, 65, 136, 130), (2, 3, 128, 16)], ids=str)
def test_linear(shape: tuple[int, int, int, int], power_of_two: bool) -> None:
    """Output and gradients of the public function with its Triton kernels."""
    B, L, D, N = shape
    leaves = [torch.randn(B, L, D).bfloat16(), torch.randn(N, D).bfloat16()]
    grad = torch.randn(B, L, N).bfloat16()
    results = []
    for function in (linears_fp8, linears_fp8_reference):
        with kernels_on_cpu() if function is linears_fp8 else contextlib.nullcontext():
            x, w = (leaf.clone().requires_grad_() for leaf in leaves)
            (y,) = function(x, [w], [Fp8Weight.of(w, power_of_two)], power_of_two)
            results.append([y.detach(), *torch.autograd.grad(y, (x, w), grad)])
    for ours, reference in zip(*results, strict=True):
        assert ours.dtype == reference.dtype
        assert relative(ours, reference) < 2e-3  # a few elements round to the adjacent bf16 value
