"""FP8 products: accuracy per tile, then TFLOP/s against cuBLASLt, DeepGEMM and bf16."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.fp8 import Quantized
from kernels.gemm import gemm_fp8
from kernels.quantization.quantize import (
    dequantize_1x128,
    dequantize_128x1,
    dequantize_128x128,
    quantize_1x128,
    quantize_128x1,
    quantize_128x128,
)
from scripts.gpu_suite.harness import Check, Place, Timing, tile_difference
from scripts.gpu_suite.harness import measure as take_time

LIMITS = {torch.float32: 1e-6, torch.bfloat16: 3e-6}
"""Limits of the difference to the exact product of the quantized operands."""
UNQUANTISED = 1e-3
CHECKED = [(256, 384, 512), (300, 260, 400), (1, 1, 1), (129, 576, 2880), (1000, 128, 64)]
MANY_TILES = (2000, 2100, 1700)
"""Shape for which some programs compute more than one tile; too slow for a dry run."""
SHAPES: list[tuple[int, ...]] = [
    (4096, 4096, 4096), (8192, 8192, 8192), (16384, 16384, 16384),
    (4096, 24576, 1536), (4096, 32768, 512), (4096, 7168, 16384), (4096, 36864, 7168),
    (4096, 7168, 18432), (4096, 4096, 7168), (4096, 7168, 2048), (4096, 2112, 7168),
    (16640, 24576, 1536), (16640, 7168, 16384), (16640, 4096, 7168), (16640, 7168, 2048),
    (16640, 5120, 8192), (16640, 8192, 5120),
]  # fmt: skip
"""M, N, K: squares, the projections of DeepSeek-V3, and two shapes with published figures."""


def check(
    place: Place, implementation: gemm_fp8.Implementation = "triton",
    shapes: list[tuple[int, int, int]] | None = None,
) -> Iterator[Check]:  # fmt: skip
    """Check every layout and output on odd shapes; then that NaNs do not spread."""
    product = functools.partial(_product, implementation)
    for shape in shapes or (CHECKED if place.dry_run else [*CHECKED, MANY_TILES]):
        torch.manual_seed(0)
        M, N, K = shape
        a, b = torch.randn(M, K).to(place.device), torch.randn(N, K).to(place.device)
        for layout in ("nt", "nn", "tn"):
            for dtype, limit in LIMITS.items():
                ours, exact = product(layout, a, b, dtype)
                case = f"gemm_fp8_{layout} {list(shape)} {str(dtype)[6:]}"
                yield Check(case, tile_difference(ours, exact), limit)
                if all(size % 128 == 0 for size in shape):  # a tile of one row is a small sample
                    loss = tile_difference(ours, a.double() @ b.double().T)
                    yield Check(f"{case}, unquantised", loss, UNQUANTISED)
    yield from _check_extremes(place, product)


def _check_extremes(place: Place, product: Callable[..., tuple[Tensor, Tensor]]) -> Iterator[Check]:
    torch.manual_seed(0)
    a, b = torch.randn(256, 384).to(place.device), torch.randn(256, 384).to(place.device)
    a[7, 130], b[:, 256:] = 1e6, 0
    a[64:128], b[128:] = a[64:128] * 1e-20, b[128:] * 1e15
    for layout in ("nt", "nn", "tn"):
        ours, exact = product(layout, a, b, torch.float32)
        yield Check(f"gemm_fp8_{layout} outliers, zeros, tiny", tile_difference(ours, exact), 1e-6)
    a[3, 5] = math.inf
    ours, _ = product("nt", a, b, torch.float32)
    expected = torch.zeros_like(ours, dtype=torch.bool)
    expected[3] = True
    yield Check("NaN outside its row, or missing", float((ours.isnan() != expected).sum()), 0)


def _product(
    implementation: gemm_fp8.Implementation, layout: str, a_MK: Tensor, b_NK: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Ours, and the fp64 product of the same quantized operands."""
    options: dict[str, Any] = {"out_dtype": dtype, "implementation": implementation}
    if layout == "tn":
        a, b = quantize_128x1(a_MK.T), quantize_128x1(b_NK.T)
        exact = dequantize_128x1(*a).double().T @ dequantize_128x1(*b).double()
        return gemm_fp8.gemm_fp8_tn(*a, *b, **options), exact
    a = quantize_1x128(a_MK)
    (b, column_major), turned = quantize_128x128(b_NK.T if layout == "nn" else b_NK), layout == "nn"
    exact_b = dequantize_128x128(*b).double()
    exact = dequantize_1x128(*a).double() @ (exact_b if turned else exact_b.T)
    if turned:
        return gemm_fp8.gemm_fp8_nn(*a, column_major, b.scales, **options), exact
    return gemm_fp8.gemm_fp8_nt(*a, *b, **options), exact


def measure(place: Place) -> Iterator[Timing]:
    """Time forward on every shape, the weight gradient on some; the input gradient has the same
    machine code as forward."""
    for i, shape in enumerate(place.shapes(SHAPES)):
        yield _measure_nt(shape, place)
        if i in (0, 1, 5, 6, 12, 15):
            yield _measure_tn(shape, place)


def _measure_nt(shape: tuple[int, ...], place: Place) -> Timing:
    M, N, K = shape
    x = torch.randn(M, K, device=place.device).bfloat16()
    w = torch.randn(N, K, device=place.device).bfloat16()
    a, (b, _) = quantize_1x128(x), quantize_128x128(w)
    exact = gemm_fp8.gemm_fp8_nt(*a, *b)
    ones = torch.ones(max(M, N), device=place.device)
    rows = {
        "ours": lambda: gemm_fp8.gemm_fp8_nt(*a, *b),
        "ours in Gluon": _gluon(gemm_fp8.gemm_fp8_nt, a, b, place),
        "cuBLASLt 1x128 128x128": _cublaslt(a, b, exact, square=True),
        "cuBLASLt row-wise": lambda: torch._scaled_mm(
            a.data, b.data.T, ones[:M, None], ones[None, :N], out_dtype=torch.bfloat16
        ),
        "DeepGEMM": _deep_gemm(a, b, exact),
        "bf16": lambda: x @ w.T,
    }  # fmt: skip
    return take_time(f"nt {M}x{N}x{K}", rows, place, flops=2.0 * M * N * K)


def _measure_tn(shape: tuple[int, ...], place: Place) -> Timing:
    tokens, N, D = shape
    x = torch.randn(tokens, D, device=place.device).bfloat16()
    dy = torch.randn(tokens, N, device=place.device).bfloat16()
    a, b = quantize_128x1(dy), quantize_128x1(x)
    exact = gemm_fp8.gemm_fp8_tn(*a, *b)
    turned = [Quantized(q.data.T, q.scales.T) for q in (a, b)]
    rows = {
        "ours": lambda: gemm_fp8.gemm_fp8_tn(*a, *b),
        "ours in Gluon": _gluon(gemm_fp8.gemm_fp8_tn, a, b, place),
        "cuBLASLt 1x128 1x128": _cublaslt(turned[0], turned[1], exact, square=False),
        "bf16": lambda: dy.T @ x,
    }
    return take_time(f"tn {N}x{D}x{tokens}", rows, place, flops=2.0 * tokens * N * D)


def _gluon(
    product: Callable[..., Tensor], a: Quantized, b: Quantized, place: Place
) -> Callable[[], Tensor]:
    """Only if the section `gluon` passed: a barrier that never completes would end this one."""

    def run() -> Tensor:
        if place.device.type != "cuda":
            raise RuntimeError("no CUDA device")
        if place.compiles_only or "gluon" in place.failed:
            raise RuntimeError("its checks failed, or did not run")
        return product(*a, *b, implementation="gluon")

    return run


def _cublaslt(a: Quantized, b: Quantized, expected: Tensor, square: bool) -> Callable[[], Any]:
    """`a @ b.T` by torch's binding, which requires 128x128 scales padded to multiples of four along
    K. The form of b's scales differs between versions: the one with the correct result is used."""

    def scales_of_b() -> Iterator[Tensor]:
        scales = b.scales
        if square:
            scales = torch.nn.functional.pad(scales, (0, -scales.shape[1] % 4))
        yield scales.T
        yield scales

    found: list[Tensor] = []

    def run() -> Any:
        import torch.nn.functional as F

        kinds = F.ScalingType
        kind_b = kinds.BlockWise128x128 if square else kinds.BlockWise1x128
        if found:
            return F.scaled_mm(a.data, b.data.T, a.scales, kinds.BlockWise1x128, found[0], kind_b)
        problem: Exception | None = None
        for scales in scales_of_b():
            try:
                out = F.scaled_mm(a.data, b.data.T, a.scales, kinds.BlockWise1x128, scales, kind_b)
            except Exception as error:
                problem = problem or error
                continue
            if tile_difference(out, expected) < 1e-4:
                found.append(scales)
                return out
        raise problem or RuntimeError("its result is not the product")

    return run


def tma_aligned(scales_MK: Tensor) -> Tensor:
    """The same scales with the memory order that DeepGEMM would convert them to in every call: by
    columns, each a multiple of 16 bytes."""
    M, K = scales_MK.shape
    columns = scales_MK.new_zeros(K, M + -M % 4)
    columns[:, :M] = scales_MK.T
    return columns.T[:M]


def _deep_gemm(a: Quantized, b: Quantized, expected: Tensor) -> Callable[[], Any]:
    out, rows = torch.empty_like(expected), (a.data, tma_aligned(a.scales))
    checked: list[bool] = []

    def run() -> Tensor:
        import deep_gemm  # type: ignore[import-not-found]  # a peer, measured where installed

        deep_gemm.fp8_gemm_nt(rows, tuple(b), out)
        if not checked:
            if tile_difference(out, expected) > 1e-4:
                raise RuntimeError("its result is not the product")
            checked.append(True)
        return out

    return run
