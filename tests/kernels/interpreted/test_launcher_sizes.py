"""Every launcher, compiled with each of its sizes at 1, 16 and an odd number.

Triton compiles a size of 1 into the code as a constant, and treats multiples of 16 apart. A kernel
that computes with such a constant as with a number, or that assumes a multiple, does not compile
for some size only.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.fp8 import empty_column_major
from kernels.gemm import gemm_fp8_gluon, gemm_fp8_triton
from kernels.group_schedule import schedule
from kernels.grouped_gemm import grouped_gemm_fp8_gluon, grouped_gemm_triton
from kernels.layers import cross_entropy_triton, norm_triton, rope_triton
from kernels.mlp import swiglu_fp8_triton, swiglu_triton
from kernels.moe import permute_triton, router_triton
from kernels.paged_attention import paged_attention_triton
from kernels.paged_attention.batch import PagedBatch
from kernels.quantization import quantize_triton
from kernels.quantization.transpose_triton import to_row_major
from scripts.kernel_table.case import TARGETS, fp8_of
from scripts.kernel_table.offline import offline

SIZES = (1, 16, 37)
USUAL = 256
BF16 = torch.bfloat16
Dtype = torch.dtype


def n(size: int) -> int:
    """Blocks of 128."""
    return -(-size // 128)


def products(launch: Callable[..., object], fp8: Dtype, M: int, N: int, K: int) -> None:
    """NT, and TN with a scale per row of both."""
    for out in (BF16, torch.float32):
        a, b = torch.empty(M, K, dtype=fp8), torch.empty(N, K, dtype=fp8)
        scales_a = empty_column_major((M, n(K)), torch.float32, a.device)
        scales_b = empty_column_major((N, n(K)), torch.float32, a.device)
        launch(a, scales_a, b, torch.empty(n(N), n(K)), torch.empty(M, N, dtype=out))
        launch(a, scales_a, b, scales_b, torch.empty(M, N, dtype=out))


def grouped_rows(
    launch: Callable[..., object], dtype: Dtype | None, fp8: Dtype, R: int, E: int, N: int, K: int
) -> None:
    """NT and NN. dtype: None is FP8."""
    ends = torch.zeros(E, dtype=torch.int64)
    a = torch.empty(R, K, dtype=dtype or fp8)
    scales = empty_column_major((R, n(K)), torch.float32, a.device), torch.empty(E, n(N), n(K))
    scales_a, scales_b = scales if dtype is None else (None, None)
    out = torch.empty(R, N, dtype=dtype or BF16)
    for b in (torch.empty(E, N, K, dtype=a.dtype), torch.empty(E, K, N, dtype=a.dtype).mT):
        launch(a, scales_a, b, scales_b, ends, ends, out)


def grouped_weights(
    launch: Callable[..., object], dtype: Dtype | None, aligns: tuple[int, ...], fp8: Dtype,
    R: int, E: int, M: int, N: int,
) -> None:  # fmt: skip
    ends = torch.zeros(E, dtype=torch.int64)
    kind = dtype or fp8
    a, b = (empty_column_major((R, size), kind, ends.device) for size in (M, N))
    scales_a, scales_b = (torch.empty(R // 128 + E, size) for size in (M, N))
    scales: tuple[Tensor | None, ...] = (scales_a, scales_b) if dtype is None else (None, None)
    for align in aligns:
        launch(a, scales[0], b, scales[1], ends, ends, torch.empty(E, M, N), align)


def quantized(fp8: Dtype, R: int, D: int, E: int) -> None:
    x, ends = torch.empty(R, D, dtype=BF16), torch.zeros(E, dtype=torch.int64)
    for rows, columns in ((True, False), (False, True), (True, True)):
        quantize_triton.quantize_groups(x, fp8, False, rows, columns)
        if columns:
            quantize_triton.quantize_groups(x, fp8, False, rows, columns, (ends, ends))
    quantize_triton.quantize_blocks(torch.empty(E, R, D, dtype=BF16), fp8, False)


def norms(fp8: Dtype, R: int, D: int) -> None:
    x, weight = torch.empty(R, D, dtype=BF16), torch.empty(D)
    norm_triton.forward(x, weight, 1e-5)
    norm_triton.backward(x, x, weight, torch.empty(R))


def rotations(fp8: Dtype, T: int, H: int, half: int) -> None:
    x, table = torch.empty(T, H, 2 * half, dtype=BF16), torch.empty(T, half)
    for interleaved in (False, True):
        rope_triton.rotate(x, table, table, interleaved, False)


def losses(fp8: Dtype, T: int, V: int) -> None:
    targets = torch.zeros(T, dtype=torch.int64)
    for whole, with_gradient in ((None, False), (None, True), (torch.empty(T), True)):
        logits = torch.empty(T, V, dtype=BF16)
        cross_entropy_triton.token_losses_(logits, targets, whole, 1e-4, with_gradient)


def activations(fp8: Dtype, R: int, F: int, E: int) -> None:
    x, weights = torch.empty(R, 2 * F, dtype=BF16), torch.empty(R)
    grad, ends = torch.empty(R, F, dtype=BF16), torch.zeros(E, dtype=torch.int64)
    swiglu_triton.swiglu_forward(x, weights, "swiglu")
    for with_h in (False, True):
        swiglu_triton.swiglu_backward(grad, x, weights, "swiglu", with_h)
    swiglu_fp8_triton.forward(x, weights, "clamped_swiglu", fp8, power_of_two=False)
    for at in (None, ends):
        swiglu_fp8_triton.backward(grad, x, weights, "swiglu", fp8, False, at, at, None)


def permutations(fp8: Dtype, T: int, top_k: int, E: int, D: int) -> None:
    ids = torch.zeros(T * top_k, dtype=torch.int64)
    _, histograms = permute_triton.ranks(ids, E)
    for align in SIZES:
        permute_triton.places(ids, ids, histograms, E, align, len(ids) + E * (align - 1))
    rows = torch.empty(T, D, dtype=BF16)
    permute_triton.gather(rows, ids, ids, top_k)
    permute_triton.combine(torch.empty(T * top_k, D, dtype=BF16), ids, top_k)


def routers(fp8: Dtype, T: int, E: int) -> None:
    top_k = min(2, E)
    logits, ids = torch.empty(T, E), torch.zeros(T, top_k, dtype=torch.int64)
    for given in (None, ids):
        router_triton.route(logits, torch.empty(E), given, top_k, True, 1, 1, False, 1.0)
    router_triton.backward(torch.empty(T, top_k), logits, ids, True, True, 1.0)


def attention(
    fp8: Dtype, B: int, heads_per_group: int, G: int, C: int, pages: int, page_size: int
) -> None:
    H = heads_per_group * G
    integers = torch.zeros(B + 1, dtype=torch.int32)
    tables = torch.zeros(B, pages, dtype=torch.int32)
    keys = torch.empty(4, G, C, page_size, dtype=BF16)
    values = torch.empty(4, G, page_size, C, dtype=BF16)
    for decodes in (B, 0):
        batch = PagedBatch(tables, integers, integers[1:], decodes)
        q = torch.empty(B, H, C, dtype=BF16)
        paged_attention_triton.attend(
            q, keys, values, batch, 0.1, 0, 0, torch.empty(H), shared=False
        )
    slots = torch.zeros(B, dtype=torch.int64)
    paged_attention_triton.write(torch.empty(B, G, C, dtype=BF16), values.transpose(1, 2), slots)


def transposes(fp8: Dtype, E: int, R: int, K: int) -> None:
    to_row_major(torch.empty(E, K, R, dtype=fp8).mT)


def schedules(fp8: Dtype, R: int, E: int) -> None:
    ends = torch.zeros(E, dtype=torch.int64)
    for split in (False, True):
        schedule(ends, ends, R, 128, split)


gluon = grouped_gemm_fp8_gluon
MATRIX, ROWS, WEIGHTS = ("M", "N", "K"), ("R", "E", "N", "K"), ("R", "E", "M", "N")
LAUNCHERS: dict[str, tuple[Callable[..., object], tuple[str, ...]]] = {
    "gemm_fp8": (partial(products, gemm_fp8_triton.gemm), MATRIX),
    "gemm_fp8 Gluon": (partial(products, gemm_fp8_gluon.gemm), MATRIX),
    "rows fp8": (partial(grouped_rows, grouped_gemm_triton.by_rows, None), ROWS),
    "rows bf16": (partial(grouped_rows, grouped_gemm_triton.by_rows, BF16), ROWS),
    "rows fp32": (partial(grouped_rows, grouped_gemm_triton.by_rows, torch.float32), ROWS),
    "rows Gluon": (partial(grouped_rows, gluon.by_rows, None), ROWS),
    "weights fp8": (
        partial(grouped_weights, grouped_gemm_triton.by_groups, None, (1, 32, 128)), WEIGHTS,
    ),
    "weights bf16": (partial(grouped_weights, grouped_gemm_triton.by_groups, BF16, (1,)), WEIGHTS),
    "weights Gluon": (partial(grouped_weights, gluon.by_groups, None, (128,)), WEIGHTS),
    "quantize": (quantized, ("R", "D", "E")),
    "norm": (norms, ("R", "D")),
    "rotate": (rotations, ("T", "H", "half")),
    "loss": (losses, ("T", "V")),
    "swiglu": (activations, ("R", "F", "E")),
    "permute": (permutations, ("T", "top_k", "E", "D")),
    "router": (routers, ("T", "E")),
    "attention": (attention, ("B", "heads_per_group", "G", "C", "pages", "page_size")),
    "transpose": (transposes, ("E", "R", "K")),
    "schedule": (schedules, ("R", "E")),
}  # fmt: skip
MOST = {"E": 8, "top_k": 8, "G": 4, "H": 4, "heads_per_group": 4, "C": 64,
        "half": 64}  # fmt: skip
"""Usual sizes other than 256."""


def variations(names: tuple[str, ...]) -> Iterator[dict[str, int]]:
    """All sizes as usual except one; all 1."""
    usual = {name: MOST.get(name, USUAL) for name in names}
    for name in names:
        for size in SIZES:
            yield usual | {name: size}
    yield dict.fromkeys(names, 1)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_size_compiles(name: str, target: str) -> None:
    launch, names = LAUNCHERS[name]
    if "Gluon" in name and target != "sm_90":
        pytest.skip("Gluon is for Hopper")
    wrong: list[Any] = []
    with offline(*TARGETS[target]) as builds:
        for sizes in variations(names):
            try:
                launch(fp8_of(target), **sizes)
            except Exception as error:
                wrong.append((sizes, f"{type(error).__name__}: {error}".splitlines()[0]))
    assert not wrong and builds
