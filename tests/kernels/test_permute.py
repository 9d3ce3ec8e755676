"""Permutation, gather and combine against plain loops, on the CPU: order, gaps, choices without an
expert, gradients, quantized rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.moe.permute import (
    Permutation,
    combine_rows,
    combine_rows_reference,
    gather_rows,
    gather_rows_reference,
    permutation,
    permutation_reference,
)


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Experts of tokens, often skewed, some of them none; and the number of experts."""
    experts, top_k = draw(st.sampled_from([1, 2, 7, 40])), draw(st.sampled_from([1, 2, 3, 8]))
    tokens = draw(st.integers(0, 24))
    favourite = draw(st.integers(0, experts))
    one = st.one_of(st.integers(0, experts), st.just(favourite))
    flat = draw(st.lists(one, min_size=tokens * top_k, max_size=tokens * top_k))
    return torch.tensor(flat, dtype=torch.int64).view(tokens, top_k), experts


def assert_groups(to: Permutation, ids_TK: Tensor, n_experts: int, align: int) -> None:
    """A permutation computed from the definition: groups aligned, in token order, the two maps
    inverse of each other, all other slots empty."""
    flat, held = ids_TK.reshape(-1).tolist(), []
    order, start = to.order_P.tolist(), 0
    for e, end in enumerate(to.ends_E.tolist()):
        rows = [i for i, named in enumerate(flat) if named == e]
        padded = -(-len(rows) // align) * align
        assert end == start + padded and int(to.counts_E[e]) == len(rows)
        assert order[start:end] == rows + [-1] * (padded - len(rows))
        held += rows
        start = end
    assert all(i == -1 for i in order[start:])
    for i, slot in enumerate(to.inverse_R.tolist()):
        assert (slot == -1) == (flat[i] == n_experts) and (slot == -1 or order[slot] == i)
    assert len(held) == sum(e < n_experts for e in flat)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(choices(), st.sampled_from([1, 16, 32, 128]), st.booleans())
def test_permutation_and_movement(choice: tuple[Tensor, int], align: int, rows_known: bool) -> None:
    ids, experts = choice
    n_rows = int((ids < experts).sum()) if rows_known else None
    to = permutation(ids, experts, align, n_rows)
    assert_groups(to, ids, experts, align)
    by_loops = permutation_reference(ids, experts, align, n_rows)
    assert all(torch.equal(a, b) for a, b in zip(to, by_loops, strict=True))
    x = torch.randn(len(ids), 3, dtype=torch.float64, requires_grad=True)
    rows = gather_rows(x, to)
    expected = torch.zeros(len(to.order_P), 3, dtype=torch.float64)
    for slot, row in enumerate(to.order_P.tolist()):
        if row >= 0:
            expected[slot] = x[row // ids.shape[1]].detach()
    assert torch.equal(rows, expected) and torch.equal(gather_rows_reference(x, to), expected)
    done = torch.randn(len(rows), 3, dtype=torch.float64, requires_grad=True)
    back = combine_rows(done, to, ids.shape[1])
    sums = torch.zeros(len(ids), 3, dtype=torch.float64)
    for row, slot in enumerate(to.inverse_R.tolist()):
        if slot >= 0:
            sums[row // ids.shape[1]] += done[slot].detach()
    torch.testing.assert_close(back, sums)
    reference = combine_rows_reference(done, to, ids.shape[1])  # sums in fp32
    torch.testing.assert_close(reference, sums, rtol=1e-5, atol=1e-6)
    # each one's gradient is the other
    (to_x,) = torch.autograd.grad(rows, x, done.detach())
    (to_done,) = torch.autograd.grad(back, done, x.detach())
    assert torch.equal(to_x, back) and torch.equal(to_done, rows)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("align", [1, 32])
def test_bf16_is_rounded_once(top_k: int, align: int) -> None:
    torch.manual_seed(0)
    to = permutation(torch.randint(0, 6, (50, top_k)), 5, align)
    x = torch.randn(50, 9).bfloat16().requires_grad_()
    rows = gather_rows(x, to)
    done = torch.randn(rows.shape).bfloat16()
    assert torch.equal(rows, gather_rows_reference(x, to))
    expected = combine_rows_reference(done, to, top_k)
    assert torch.equal(combine_rows(done, to, top_k), expected)
    assert torch.equal(torch.autograd.grad(rows, x, done)[0], expected)


def test_nobody_gets_nothing_and_gives_nothing() -> None:
    ids = torch.tensor([2, 0, 2, 1, 1])  # 2 means no expert
    to = permutation(ids, 2)
    assert to.order_P.tolist() == [1, 3, 4, -1, -1] and to.ends_E.tolist() == [1, 3]
    assert to.inverse_R.tolist() == [-1, 0, -1, 1, 2]
    rows = torch.arange(1.0, 6)[:, None]
    there = gather_rows(rows, to)
    assert there[:, 0].tolist() == [2, 4, 5, 0, 0]
    there[3:] = float("nan")  # rows of empty slots are not read
    assert combine_rows(there, to, 1)[:, 0].tolist() == [0, 2, 0, 4, 5]
