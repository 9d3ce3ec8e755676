"""Products of groups of rows on a CPU: rounding the numbers of rows changes no result and gives few
sizes."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.grouped_gemm import grouped_gemm_cpu as cpu

N, K, BEYOND = 6, 10, 7
EIGHT_PER_OCTAVE = [*range(1, 17), *range(18, 33, 2), *range(36, 65, 4)]
SIZES = st.lists(
    st.tuples(st.integers(0, 300), st.sampled_from([0, 0, 1, 40])), min_size=1, max_size=6
)


def integers(random: torch.Generator, *shape: int) -> Tensor:
    """bf16 values whose products and sums of K terms are exact in bf16."""
    return torch.randint(-2, 3, shape, generator=random).bfloat16()


def layout(sizes: list[tuple[int, int]]) -> tuple[list[slice], int]:
    """Groups of these numbers of rows, each followed by the given number of zero rows; and the end
    of the last."""
    ends = torch.tensor([0, *(n + zeros for n, zeros in sizes)]).cumsum(0).tolist()
    groups = [slice(start, start + n) for start, (n, _) in zip(ends, sizes, strict=False)]
    return groups, groups[-1].stop


def sizes_multiplied(kind: str, sizes: range) -> set[int]:
    """Row counts of the products that two groups with each of these sizes cause."""
    seen = set[int]()
    multiply = torch.mm

    def record(a: Tensor, b: Tensor, **options: Tensor) -> Tensor:
        seen.add(a.shape[1] if kind == "sum_over_rows" else a.shape[0])
        return multiply(a, b, **options)

    x, dy = torch.zeros(2 * sizes.stop, K).bfloat16(), torch.zeros(2 * sizes.stop, N).bfloat16()
    w, dw = torch.zeros(2, N, K).bfloat16(), torch.zeros(N, K).bfloat16()
    with mock.patch.object(torch, "mm", record):
        for n in sizes:
            if kind == "multiply_rows":
                cpu.multiply_rows(x, w, [slice(0, n), slice(n, 2 * n)], dy)
            elif kind == "multiply":
                cpu.multiply(x[:n], w[0].T, dy[:n])
            else:
                cpu.sum_over_rows(dy[:n], x[:n], dw)
    return seen


@given(SIZES, st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_rows_of_every_group(sizes: list[tuple[int, int]], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    groups, end = layout(sizes)
    x, w = integers(random, end + BEYOND, K), integers(random, len(groups), N, K)
    between = torch.ones(end + BEYOND, dtype=torch.bool)
    for rows in groups:
        between[rows] = False
    x[between] = 0
    x[end:] = math.nan  # never read
    y = torch.zeros(end + BEYOND, N).bfloat16()
    y[end:] = 5
    cpu.multiply_rows(x, w, groups, y)
    for rows, w_NK in zip(groups, w, strict=True):
        assert torch.equal(y[rows].float(), x[rows].float() @ w_NK.float().T)
    assert (y[:end][between[:end]] == 0).all() and (y[end:] == 5).all()


@given(st.integers(0, 300), st.booleans(), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_one_group(n_rows: int, wide: bool, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x, dy = integers(random, n_rows, K), integers(random, n_rows, N)
    w = integers(random, N, K)
    dtype = torch.float32 if wide else torch.bfloat16
    y = torch.full((n_rows, N), math.nan, dtype=dtype)
    cpu.multiply(x, w.T, y)
    assert torch.equal(y.float(), x.float() @ w.float().T)
    dw = torch.full((N, K), math.nan, dtype=dtype)
    cpu.sum_over_rows(dy, x, dw)
    exact = dy.float().T @ x.float()
    assert torch.equal(dw, exact.bfloat16().to(dtype))


@pytest.mark.parametrize("kind", ["multiply_rows", "multiply", "sum_over_rows"])
@pytest.mark.parametrize(("code", "per_octave"), [(2e3, 32), (1e7, 8)])
def test_few_sizes_are_multiplied(kind: str, code: float, per_octave: int) -> None:
    """Up to 64 rows: multiples of 8. Where rows are summed over, and above: 32 sizes per octave if
    generating code costs as much as a few rows, 8 if it costs much more."""
    costs = cpu.Costs(code, operation=1.0)
    with mock.patch.object(cpu, "measured_costs", lambda: costs):
        sizes = sorted(sizes_multiplied(kind, range(1, 513)))
    assert [n for n in sizes if n > 64] == [
        octave + octave // per_octave * i
        for octave in (64, 128, 256)
        for i in range(1, per_octave + 1)
    ]
    few = [n for n in sizes if n <= 64]
    if kind != "sum_over_rows":
        assert few == [*range(8, 65, 8)]
    else:
        assert few == ([*range(1, 65)] if per_octave == 32 else EIGHT_PER_OCTAVE)


def test_steps_shrink_as_rows_cost_more() -> None:
    """Sums over 515 rows with increasingly large matrices, until a row costs more than code
    generation."""
    costs = cpu.Costs(code=3e5, operation=1 / 450)
    widths = (2**6, 2**10, 2**13, 2**14, 2**15, 2**17)
    sizes = [cpu.rounded_up(515, N, 2**10, 0, costs) for N in widths]
    assert sizes == [576, 528, 520, 516, 516, 515]
    assert cpu.rounded_up(515, 2**10, 2**10, 2**13, costs) == 515  # no copies either
    row = torch.empty(1, 1)
    assert cpu._rounded(row, 515, 2**10, 2**10) == 515


@given(
    st.integers(1, 10**6), st.integers(1, 2**15), st.integers(1, 2**15),
    st.floats(1e5, 1e8), st.floats(1e-5, 1),
)  # fmt: skip
def test_added_rows_cost_less_than_code(
    rows: int, N: int, K: int, code: float, operation: float
) -> None:
    added = cpu.rounded_up(rows, N, K, 0, cpu.Costs(code, operation)) - rows
    assert 0 <= added <= rows / 8 and added * 2 * N * K * operation <= code


def test_costs_are_measured() -> None:
    """Wide bounds, which hold for any CPU: 10 us to 0.1 s, and 1 to 10,000 GFLOP/s."""
    costs = cpu.measured_costs()
    assert 1e4 < costs.code < 1e8 and 1e-4 < costs.operation < 1


def test_added_rows_change_no_bit() -> None:
    """Random values: the same bits as with zeros or other rows behind them, on this CPU."""
    random = torch.Generator().manual_seed(0)
    for n, wide, narrow in ((65, 96, 40), (301, 130, 256), (700, 64, 48)):
        x = torch.randn(n + 100, wide, generator=random).bfloat16()
        y = torch.randn(n, narrow, generator=random).bfloat16()
        w = torch.randn(narrow, wide, generator=random).bfloat16()
        alone, sums = torch.mm(x[:n], w.T), torch.mm(y.T, x[:n])
        for added in (1, 8, 31, 100):
            assert torch.equal(torch.mm(x[: n + added], w.T)[:n], alone)
            behind = [torch.cat([t, torch.zeros(added, t.shape[1]).bfloat16()]) for t in (y, x[:n])]
            assert torch.equal(torch.mm(behind[0].T, behind[1]), sums)


def test_zero_rows_stay_zero_beside_an_infinite_weight() -> None:
    """Rounded sizes multiply zero rows too, and zero times infinity is NaN."""
    groups, end = layout([(40, 24), (0, 8), (17, 47), (70, 0)])
    x, w = torch.zeros(end, K).bfloat16(), torch.ones(len(groups), N, K).bfloat16()
    for rows in groups:
        x[rows] = 1
    w[:, 0, 0] = math.inf
    y = torch.full((end, N), math.nan).bfloat16()
    with mock.patch.object(cpu, "measured_costs", lambda: cpu.Costs(1e9, 1e-3)):
        cpu.multiply_rows(x, w, groups, y)
    true = torch.zeros(end, dtype=torch.bool)
    for rows in groups:
        true[rows] = True
    assert (y[~true] == 0).all()
    assert (y[true, 0] == math.inf).all() and (y[true, 1:] == K).all()
