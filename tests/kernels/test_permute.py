"""Permutations in which some choices have no row: in order, back, and as each other's transpose."""

import random

import pytest
import torch

from kernels.permute import (
    combine_rows,
    combine_rows_reference,
    gather_rows,
    gather_rows_reference,
    permutation,
)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("align", [1, 8])
def test_absent_choices(seed: int, align: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tokens, top_k, experts = rng.choice([0, 1, 5, 17]), rng.choice([1, 2, 3]), rng.choice([1, 3, 7])
    ids = torch.randint(0, experts + 1, (tokens, top_k))
    if rng.random() < 0.2:
        ids.fill_(experts)  # nobody is named at all
    named = ids != experts
    to = permutation(ids, experts, align, n_rows=int(named.sum()))
    assert to.counts_E.tolist() == [int((ids == e).sum()) for e in range(experts)]
    assert to.ends_E[-1] == len(to.order_P)
    x = torch.randn(tokens, 4, dtype=torch.float64)
    rows = gather_rows(x, to)
    assert torch.equal(rows, gather_rows_reference(x, to))
    start = 0
    for e, (end, count) in enumerate(zip(to.ends_E.tolist(), to.counts_E.tolist(), strict=True)):
        expected = x[(ids == e).nonzero()[:, 0]]  # in token order
        assert torch.equal(rows[start : start + count], expected)
        assert not rows[start + count : end].any()
        start = end
    done = torch.randn(len(rows), 4, dtype=torch.float64)
    back = combine_rows(done, to, top_k)
    assert back.shape == x.shape
    expected = combine_rows_reference(done, to, top_k)  # sums in fp32
    torch.testing.assert_close(back, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((rows * done).sum(), (x * back).sum())


def test_rows_of_nobody_lie_behind_the_last_end() -> None:
    ids = torch.tensor([2, 0, 2, 1, 1])  # 2 names nobody
    to = permutation(ids, 2)
    assert to.order_P.tolist() == [1, 3, 4, 0, 2] and to.ends_E.tolist() == [1, 3]
    rows = torch.arange(5.0)[:, None]
    assert torch.equal(combine_rows(gather_rows(rows, to), to, 1), rows)
