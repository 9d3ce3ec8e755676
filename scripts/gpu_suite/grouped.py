"""Grouped products of experts: accuracy, then TFLOP/s against torch, a loop of cuBLAS, DeepGEMM."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.fp8 import BLOCK, Quantized
from kernels.grouped_gemm import grouped_gemm as bf16
from kernels.grouped_gemm import grouped_gemm_fp8 as fp8
from kernels.quantization.quantize import (
    dequantize_1x128,
    dequantize_128x1_grouped,
    dequantize_128x128,
    quantize_1x128,
    quantize_128x1_grouped,
    quantize_128x128,
)
from scripts.gpu_suite.gemm import tma_aligned
from scripts.gpu_suite.harness import Check, Place, Timing
from scripts.gpu_suite.harness import measure as take_time

SHAPES: list[tuple[int, ...]] = [
    (128, 262144, 1536, 2048), (32, 32768, 4096, 7168),
    (128, 262144, 2048, 768), (32, 32768, 7168, 2048),
    (8, 16384, 28672, 4096), (8, 16384, 4096, 14336),
]  # fmt: skip
"""Experts, rows, N, K. Both projections of Qwen3-30B-A3B at 32,768 tokens with 8 experts each, of
a rank's share of DeepSeek-V3 (256 experts on 8 ranks of 4,096 tokens), and of Mixtral at 8,192."""
CHECKED: list[tuple[list[int], int, int, int]] = [
    ([300, 0, 1, 212], 136, 264, 1), ([5, 0], 16, 24, 1), ([130, 0, 255, 1], 144, 400, 128),
    ([33, 40, 0, 7], 256, 128, 32), ([i % 5 for i in range(256)], 48, 80, 1),
]  # fmt: skip
"""True rows of the groups, N, K, and the alignment of group starts."""
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
"""Limits of ||difference|| / ||exact||: fp32 sums in another order, one rounding to bf16."""
Operands = tuple[list[Quantized], list[Quantized], Quantized, Tensor]
TOP_K = 8
"""Rows per token, if they are gathered."""
BEYOND = 9
"""Rows past the last end, NaN."""


def check(place: Place) -> Iterator[Check]:
    """Check every product, on groups followed by zero rows, against fp64 of the same operands."""
    for sizes, N, K, align in CHECKED:
        torch.manual_seed(0)
        ends, counts = _groups(sizes, align, place)
        x, dy = (_rows(width, ends, counts, BEYOND, place) for width in (K, N))
        w = torch.randn(len(sizes), N, K, device=place.device).bfloat16()
        shape = f"{len(sizes)} groups, {[N, K]}, align {align}"
        outputs = _bf16(x, dy, w, ends, counts)
        exact = tuple(t.double() for t in (x, dy, w, x, dy))
        yield from _check(f"{shape}, bf16", outputs, exact, ends, counts)
        operands = _quantized(x, dy, w, ends, counts)
        outputs = _fp8(operands, ends, counts, align)
        yield from _check(f"{shape}, fp8", outputs, _exact(operands, ends, counts), ends, counts)


def _check(
    case: str, outputs: dict[str, Tensor], exact: tuple[Tensor, ...], ends: Tensor, counts: Tensor
) -> Iterator[Check]:
    x, dy, w, x_columns, dy_columns = exact
    last = int(ends[-1])
    y, dx, dw = x.new_zeros(last, w.shape[1]), x.new_zeros(last, w.shape[2]), torch.zeros_like(w)
    for e, rows in enumerate(bf16.true_rows(ends, counts)):
        y[rows], dx[rows] = x[rows] @ w[e].T, dy[rows] @ w[e]
        dw[e] = dy_columns[rows].T @ x_columns[rows]
    for name, out in outputs.items():
        expected = {"nt": y, "nn": dx}.get(name, dw)
        out = out[: len(expected)]
        error = float((out.double() - expected).norm() / expected.norm())
        yield Check(f"{name}, {case}", error, LIMITS[out.dtype])


def _bf16(x: Tensor, dy: Tensor, w: Tensor, ends: Tensor, counts: Tensor) -> dict[str, Tensor]:
    return {
        "nt": bf16.grouped_gemm_nt(x, w, ends, counts, "triton"),
        "nn": bf16.grouped_gemm_nn(dy, w, ends, counts, "triton"),
        "tn": bf16.grouped_gemm_tn(dy, x, ends, counts, implementation="triton"),
        "tn, fp32": bf16.grouped_gemm_tn(dy, x, ends, counts, torch.float32),
    }


def _quantized(x: Tensor, dy: Tensor, w: Tensor, ends: Tensor, counts: Tensor) -> Operands:
    """Rows and columns of x and dy, and w in both memory orders."""
    rows = [quantize_1x128(t) for t in (x, dy)]
    columns = [quantize_128x1_grouped(t, ends, counts) for t in (x, dy)]
    weight, turned = quantize_128x128(w)
    return rows, columns, weight, turned


def _exact(operands: Operands, ends: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    """The dequantized operands: x, dy and w, then x and dy of the weight gradient."""
    rows, columns, weight, _ = operands
    return (
        *(dequantize_1x128(*t).double() for t in rows),
        dequantize_128x128(*weight).double(),
        *(dequantize_128x1_grouped(*t, ends, counts).double() for t in columns),
    )


def _fp8(operands: Operands, ends: Tensor, counts: Tensor, align: int) -> dict[str, Tensor]:
    (x, dy), columns, weight, turned = operands
    both = *columns[1], *columns[0], ends, counts
    return {
        "nt": fp8.grouped_gemm_fp8_nt(*x, *weight, ends, counts),
        "nn": fp8.grouped_gemm_fp8_nn(*dy, turned, weight.scales, ends, counts),
        "tn": fp8.grouped_gemm_fp8_tn(*both, align=align),
        "tn, fp32": fp8.grouped_gemm_fp8_tn(*both, torch.float32, align=align),
    }


def measure(place: Place) -> Iterator[Timing]:
    """Time all products, balanced and skewed. FP8 rows are aligned to 128, as in training."""
    for E, R, N, K in place.shapes(SHAPES):
        for name, sizes in (("balanced", [R // E] * E), ("skewed", _skewed(E, R))):
            torch.manual_seed(0)
            w = torch.randn(E, N, K, device=place.device).bfloat16()
            case = f"E{E} {R}x{N}x{K} {name}"
            flops = 2.0 * R * N * K
            yield from _measure_bf16(case, sizes, w, flops, place)
            yield from _measure_fp8(case, sizes, w, flops, place)


def _measure_bf16(
    case: str, sizes: list[int], w: Tensor, flops: float, place: Place
) -> Iterator[Timing]:
    ends, counts = _groups(sizes, 1, place)
    x, dy = (_rows(width, ends, counts, 0, place) for width in (w.shape[2], w.shape[1]))
    offsets, groups = ends.to(torch.int32), list(enumerate(bf16.true_rows(ends, counts)))
    ours: dict[str, Callable[[], Any]] = {
        "nt": lambda: bf16.grouped_gemm_nt(x, w, ends, counts, "triton"),
        "nn": lambda: bf16.grouped_gemm_nn(dy, w, ends, counts, "triton"),
        "tn": lambda: bf16.grouped_gemm_tn(dy, x, ends, counts, implementation="triton"),
    }
    peers: dict[str, Callable[[], Any]] = {
        "nt": lambda: torch._grouped_mm(x, w.mT, offs=offsets),
        "nn": lambda: torch._grouped_mm(dy, w, offs=offsets),
        "tn": lambda: torch._grouped_mm(dy.T, x, offs=offsets),
    }
    loops: dict[str, Callable[[], Any]] = {
        "nt": lambda: [x[rows] @ w[e].T for e, rows in groups],
        "nn": lambda: [dy[rows] @ w[e] for e, rows in groups],
        "tn": lambda: [dy[rows].T @ x[rows] for _, rows in groups],
    }
    for layout, run in ours.items():
        rows = {"ours": run, "torch._grouped_mm": peers[layout], "cuBLAS loop": loops[layout]}
        if layout == "tn":
            rows["ours, fp32"] = lambda: bf16.grouped_gemm_tn(dy, x, ends, counts, torch.float32)
        yield take_time(f"{layout} bf16 {case}", rows, place, flops=flops)


def _measure_fp8(
    case: str, sizes: list[int], w: Tensor, flops: float, place: Place
) -> Iterator[Timing]:
    ends, counts = _groups(sizes, BLOCK, place)
    x, dy = (_rows(width, ends, counts, 0, place) for width in (w.shape[2], w.shape[1]))
    rows, columns, weight, turned = _quantized(x, dy, w, ends, counts)
    both = *columns[1], *columns[0], ends, counts
    offsets = ends.to(torch.int32)
    operands = {"nt": (rows[0], weight), "nn": (rows[1], (turned.mT, weight.scales.mT))}
    ours: dict[str, Callable[[], Tensor]] = {
        "nt": lambda: fp8.grouped_gemm_fp8_nt(*rows[0], *weight, ends, counts),
        "nn": lambda: fp8.grouped_gemm_fp8_nn(*rows[1], turned, weight.scales, ends, counts),
    }
    for layout, run in ours.items():
        a, b = operands[layout]
        peers: dict[str, Callable[[], Any]] = {
            "ours": run,
            "torch._scaled_grouped_mm row-wise": _row_wise(a[0], b[0], offsets),
            "DeepGEMM": _deep_gemm(a, b, ends, run),
        }
        yield take_time(f"{layout} fp8 {case}", peers, place, flops=flops)
    peers = {
        "ours": lambda: fp8.grouped_gemm_fp8_tn(*both, align=BLOCK),
        "ours, fp32": lambda: fp8.grouped_gemm_fp8_tn(*both, torch.float32, align=BLOCK),
        "torch._grouped_mm bf16": lambda: torch._grouped_mm(dy.T, x, offs=offsets),
    }
    yield take_time(f"tn fp8 {case}", peers, place, flops=flops)


def _row_wise(a: Tensor, b: Tensor, offsets: Tensor) -> Callable[[], Any]:
    """With all scales 1, which takes the same time."""
    scale_a = torch.ones(len(a), device=a.device)
    scale_b = torch.ones(b.shape[:2], device=a.device)
    return lambda: torch._scaled_grouped_mm(
        a, b.mT, scale_a, scale_b, offs=offsets, out_dtype=torch.bfloat16
    )


def _deep_gemm(a: Any, b: Any, ends: Tensor, expected: Callable[[], Tensor]) -> Callable[[], Any]:
    """Its groups begin at multiples of 128 and are specified by an expert per row."""
    slots = torch.arange(len(a[0]), device=ends.device)
    expert_of_row = torch.searchsorted(ends, slots, right=True).to(torch.int32)
    out = torch.empty(len(a[0]), b[0].shape[1], dtype=torch.bfloat16, device=ends.device)
    checked: list[bool] = []
    # what it would convert in every call
    operands = (a[0], tma_aligned(a[1])), tuple(t.contiguous() for t in b)

    def run() -> Tensor:
        import deep_gemm  # type: ignore[import-not-found]  # a peer, measured where installed

        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(*operands, out, expert_of_row)
        if not checked:
            exact = expected()
            if float((out.float() - exact.float()).norm() / exact.float().norm()) > 1e-2:
                raise RuntimeError("its result is not the product")
            checked.append(True)
        return out

    return run


def _groups(sizes: list[int], align: int, place: Place) -> tuple[Tensor, Tensor]:
    counts = torch.tensor(sizes)
    ends = ((counts + align - 1) // align * align).cumsum(0)
    return ends.to(place.device), counts.to(place.device)


def _rows(width: int, ends: Tensor, counts: Tensor, beyond: int, place: Place) -> Tensor:
    """Random true rows, followed by zero rows, and NaN after the last end."""
    x = torch.randn(int(ends[-1]) + beyond, width, device=place.device).bfloat16()
    start = 0
    for end, rows in zip(ends.tolist(), bf16.true_rows(ends, counts), strict=True):
        x[rows.stop : end] = 0
        start = end
    x[start:] = float("nan")
    return x


def _skewed(E: int, R: int) -> list[int]:
    """Log-normal popularity: the fullest of 128 experts gets about 5 times the mean."""
    generator = torch.Generator().manual_seed(0)
    popularity = (0.7 * torch.randn(E, generator=generator)).exp()
    chosen = torch.multinomial(popularity, R, replacement=True, generator=generator)
    return torch.bincount(chosen, minlength=E).tolist()
