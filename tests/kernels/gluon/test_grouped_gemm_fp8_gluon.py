"""The grouped Gluon products, executed on a CPU: results, and mutations that must be seen."""

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels.gemm import gemm_fp8_gluon
from kernels.group_schedule import ENTRY, Schedule
from kernels.grouped_gemm import grouped_gemm_fp8, grouped_gemm_fp8_gluon
from kernels.quantization import quantize
from tests.kernels.gluon.gluon_executor import Deadlock, executed
from tests.kernels.gluon.test_gemm_fp8_gluon import hopper, on, relative

PRODUCTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    name: (
        getattr(grouped_gemm_fp8, f"grouped_gemm_fp8_{name}"),
        getattr(grouped_gemm_fp8, f"grouped_gemm_fp8_{name}_reference"),
    )
    for name in ("nt", "nn", "tn")
}
BEYOND = 5
"""Rows past the last end."""


def schedule(
    ends_E: Tensor, counts_E: Tensor, n_rows: int, size: int, split: bool
) -> Schedule:  # the contract of `kernels.group_schedule.schedule`, whose own test is interpreted
    true, zero = list[list[int]](), list[list[int]]()
    first, start = list[int](), 0
    for e, (end, count) in enumerate(zip(ends_E.tolist(), counts_E.tolist(), strict=True)):
        first.append(len(true) + len(zero))
        for row in range(start, end, size):
            here = true if row < start + count or not split else zero
            here.append([e, row, start + count, end])
        start = end
    tiles = torch.zeros(1 + -(-n_rows // size) + len(ends_E), ENTRY, dtype=torch.int32)
    tiles[0, 0], tiles[0, 1] = len(true), len(zero)
    found = torch.tensor(true + zero, dtype=torch.int32).view(-1, ENTRY)
    tiles[1 : 1 + len(found)] = found
    return Schedule(tiles, torch.tensor(first, dtype=torch.int32))


@pytest.fixture(autouse=True)
def scheduled() -> Iterator[None]:
    with mock.patch.object(grouped_gemm_fp8_gluon, "schedule", schedule):
        yield


def operands(sizes: list[int], counts: list[int], N: int, K: int) -> dict[str, tuple[Any, ...]]:
    """Arguments of the three products; NaN in rows and scales that belong to no group."""
    torch.manual_seed(0)
    ends, true = torch.tensor(sizes).cumsum(0), torch.tensor(counts, dtype=torch.int32)
    R = sum(sizes) + BEYOND
    x, dy = torch.randn(R, K), torch.randn(R, N)
    start = 0
    for size, count in zip(sizes, counts, strict=True):
        x[start + count : start + size] = dy[start + count : start + size] = 0
        start += size
    x[start:] = dy[start:] = math.nan
    w = torch.randn(len(sizes), N, K) * 2.0 ** torch.randint(-9, 9, (len(sizes), N, 1))
    weight, turned = quantize.quantize_128x128(w)
    columns = []
    for rows in (dy, x):
        data, scales = quantize.quantize_128x1_grouped(rows, ends, true)
        data[start:] = math.nan
        scales[sum(-(-size // 128) for size in sizes) :] = math.nan
        columns += [data, scales]
    return {
        "nt": (*quantize.quantize_1x128(x), *weight, ends, true),
        "nn": (*quantize.quantize_1x128(dy), turned, weight.scales, ends, true),
        "tn": (*columns, ends, true),
    }


def run(layout: str, arguments: tuple[Any, ...], rows: int, n_sm: int = 2, seed: int = 0) -> Tensor:
    options = {"align": 128} if layout == "tn" else {}
    with (
        on(hopper(n_sm)),
        executed(seed),
        mock.patch.object(grouped_gemm_fp8_gluon, "choose_rows", lambda *_: rows),
    ):
        return PRODUCTS[layout][0](*arguments, torch.float32, implementation="gluon", **options)


BY_ROWS = [
    ([40, 0, 1, 300], [33, 0, 1, 290], 150, 200, 2),
    ([256, 384], [2, 128], 64, 700, 1),  # tiles without true rows; the ring is used twice
    ([0, 3], [0, 3], 1, 1, 132),
    ([1, 2] * 6, [1, 2] * 6, 16, 130, 3),
    ([0], [0], 5, 6, 2),
]
BY_GROUPS = [
    ([256, 0, 128, 128], [250, 0, 1, 128], 150, 200, 2),
    ([768, 128], [700, 128], 300, 130, 1),
    ([0, 128], [0, 3], 1, 1, 132),
]


@pytest.mark.parametrize(("sizes", "counts", "N", "K", "n_sm"), BY_ROWS, ids=str)
def test_by_rows(sizes: list[int], counts: list[int], N: int, K: int, n_sm: int) -> None:
    given, last = operands(sizes, counts, N, K), sum(sizes)
    for layout in ("nt", "nn"):
        reference = PRODUCTS[layout][1](*given[layout], torch.float32)
        zero = (reference[:last] == 0).all(1)
        for rows in gemm_fp8_gluon.SLOTS:
            ours = run(layout, given[layout], rows, n_sm)
            assert last == 0 or relative(ours[:last], reference[:last]) < 1e-6, (layout, rows)
            assert (ours[:last][zero] == 0).all(), (layout, rows)
            assert ours[last:].isnan().all(), (layout, rows)  # not written


@pytest.mark.parametrize(("sizes", "counts", "N", "K", "n_sm"), BY_GROUPS, ids=str)
def test_by_groups(sizes: list[int], counts: list[int], N: int, K: int, n_sm: int) -> None:
    arguments = operands(sizes, counts, N, K)["tn"]
    reference = PRODUCTS["tn"][1](*arguments, torch.float32)
    for rows in gemm_fp8_gluon.SLOTS:
        ours = run("tn", arguments, rows, n_sm)
        assert relative(ours, reference) < 1e-6, rows
        assert all((ours[e] == 0).all() for e, n in enumerate(counts) if not n), rows


def test_alignment_is_required() -> None:
    arguments = operands([128], [128], 16, 16)["tn"]
    with on(hopper(1)), pytest.raises(ValueError, match="needs align to be a multiple of 128"):
        PRODUCTS["tn"][0](*arguments, torch.float32, implementation="gluon", align=64)
    with pytest.raises(ValueError, match="'gluon' needs a Hopper GPU, a is on cpu"):
        PRODUCTS["tn"][0](*arguments, torch.float32, implementation="gluon")


MUTATIONS = {
    # function, its text, the mutated text
    "loader waits for the other parity": (
        "_fill", "((used // SLOTS) & 1) ^ 1",
        "(used // SLOTS) & 1",
    ),
    "loader does not wait": (
        "_fill", "mbarrier.wait(empty.index(slot), ((used // SLOTS) & 1) ^ 1)",
        "pass",
    ),
    "fewer bytes expected": (
        "_fill", "ready.index(slot), BYTES)",
        "ready.index(slot), BYTES - 128)",
    ),
    "scales of b not copied": ("_fill", "_load(scales_b, [at]", "_load(scales_b, [at + 1]"),
    "scales of a of another step": (
        "_fill", "(block + step) * stride_a",
        "(block + 0 * step) * stride_a",
    ),
    "b from another slot": ("_fill", "slots_b.index(slot))", "slots_b.index((slot + 1) % SLOTS))"),
    "group waits for the other parity": (
        "_multiply", "(used // SLOTS) & 1",
        "((used // SLOTS) & 1) ^ 1",
    ),
    "group releases before its second wave": (
        "_multiply", "if not TWO_WAVES:\n                mbarrier",
        "if True:\n                mbarrier",
    ),
    "second wave reads the first's rows": ("_multiply", "FIRST + WAVE, slot", "FIRST, slot"),
    "steps are not counted": ("_multiply", "used += 1", "used += 0"),
    "scales of the other half": (
        "_wave", "scale_slots_a.index(slot).slice(first",
        "scale_slots_a.index(slot).slice(64",
    ),
    "product before its operands": ("_wave", "mbarrier.wait(ready.index(slot), parity)", "pass"),
    "true rows of another tile": ("_store", "rows < end", "rows < end + 1"),
}  # fmt: skip


@functools.cache
def mutated_product() -> tuple[tuple[Any, ...], Tensor]:
    """Arguments of a product, and its exact result."""
    arguments = operands([300, 260], [290, 256], 140, 128 * 11)["nt"]
    reference = PRODUCTS["nt"][1](*arguments, torch.float32)
    for x in arguments[:2]:
        x[290:300] = 1  # rows that are not true must not matter
    return arguments, reference


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_seen(name: str) -> None:
    """Errors in barriers, parities, slots and scales give a deadlock, an error or other numbers."""
    where, text, mutated = MUTATIONS[name]
    function = getattr(gemm_fp8_gluon, where)
    source = re.sub(r"^@.*\n", "", inspect.getsource(function.fn))
    assert source.count(text) >= 1
    names = vars(gemm_fp8_gluon)
    scope: dict[str, Any] = {}
    exec(compile(source.replace(text, mutated), "<mutated>", "exec"), names, scope)
    arguments, reference = mutated_product()
    with mock.patch.object(function, "fn", scope[where]):
        for seed in range(3):
            try:
                ours = run("nt", arguments, 256, 1, seed)
            except (AssertionError, Deadlock):
                return
            if not relative(ours[:560], reference[:560]) < 1e-6:
                return
    raise AssertionError("no seed shows the mutation")
