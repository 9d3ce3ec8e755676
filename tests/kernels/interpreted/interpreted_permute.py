"""Interpreter tests: permutation, gather and combine of rows against their references."""

from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.moe import permute, permute_triton
from kernels.moe.permute import Permutation
from tests.kernels.interpreted.lane import kernels_on_cpu

CASES = [(0, 2, 3), (1, 8, 256), (5, 1, 1), (40, 2, 9), (170, 8, 256)]
"""Tokens, choices, experts; the last case has several tiles, and several chunks if chunks are
small."""


def choices(tokens: int, top_k: int, experts: int, kind: str) -> Tensor:
    """kind: "even"; "skewed": nine of ten choices are expert 0; "absent": a third of the choices
    have no expert."""
    ids = torch.randint(0, experts, (tokens, top_k))
    if kind == "skewed":
        ids[torch.rand(ids.shape) < 0.9] = 0
    if kind == "absent":
        ids[torch.rand(ids.shape) < 0.33] = experts
    return ids


def on_kernels(ids: Tensor, experts: int, align: int, n_rows: int | None) -> Permutation:
    with kernels_on_cpu():
        return permute.permutation(ids, experts, align, n_rows)


@pytest.mark.parametrize("kind", ["even", "skewed", "absent"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("align", "exact", "tiles"), [(1, False, 16), (1, True, 2), (16, False, 1), (128, True, 16)]
)
def test_permutation(
    align: int, exact: bool, tiles: int, case: tuple[int, int, int], kind: str
) -> None:
    """tiles: tiles of a chunk, 16 by default. exact: allocate exactly the required rows."""
    tokens, top_k, experts = case
    ids = choices(tokens, top_k, experts, kind)
    n_rows = int((ids < experts).sum()) if exact else None
    with mock.patch.object(permute_triton, "_TILES", tiles):
        ours = on_kernels(ids, experts, align, n_rows)
    reference = permute.permutation_reference(ids, experts, align, n_rows)
    room = len(ours.order_P) - len(reference.order_P)
    assert (room == 0) if align == 1 else (0 <= room <= experts * align)
    padding = reference.order_P.new_full((room,), -1)
    reference = reference._replace(order_P=torch.cat([reference.order_P, padding]))
    assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("width", [1, 7, 130, 2100])
@pytest.mark.parametrize(("top_k", "align"), [(1, 1), (3, 16)])
def test_gather_and_combine(top_k: int, align: int, width: int, dtype: torch.dtype) -> None:
    for tokens in (0, 1, 19 if width < 1000 else 6):
        ids = choices(tokens, top_k, 4, "absent")
        to = on_kernels(ids, 4, align, None)
        x = (torch.randn(tokens, width) * 50).to(dtype)
        if width == 130:  # a column of a larger matrix
            x = torch.cat([x, x], 1)[:, :width]
        with kernels_on_cpu():
            rows = permute.gather_rows(x, to)
        assert torch.equal(rows, permute.gather_rows_reference(x, to))
        if dtype == torch.uint8:
            continue
        rows[to.order_P < 0] = float("nan")  # not read
        with kernels_on_cpu():
            back = permute.combine_rows(rows, to, top_k)
        expected = permute.combine_rows_reference(rows, to, top_k)
        assert torch.equal(back, expected)  # three terms, in order, rounded once


def test_gradients() -> None:
    ids = choices(11, 3, 4, "absent")
    to = on_kernels(ids, 4, 16, None)
    x, grad = torch.randn(11, 5, requires_grad=True), torch.randn(len(to.order_P), 5)
    with kernels_on_cpu():
        (ours,) = torch.autograd.grad(permute.gather_rows(x, to), x, grad)
    (reference,) = torch.autograd.grad(permute.gather_rows_reference(x, to), x, grad)
    torch.testing.assert_close(ours, reference)
    rows, grad = torch.randn(len(to.order_P), 5, requires_grad=True), torch.randn(11, 5)
    with kernels_on_cpu():
        (ours,) = torch.autograd.grad(permute.combine_rows(rows, to, 3), rows, grad)
    (reference,) = torch.autograd.grad(permute.combine_rows_reference(rows, to, 3), rows, grad)
    torch.testing.assert_close(ours, reference)


def test_rows_beyond_2_31() -> None:
    """Slots and tokens so far apart that 32-bit offsets would overflow."""
    width, block = 2**30, 64
    memory = torch.from_numpy(np.empty(4 * width * 2, np.uint8)).view(torch.bfloat16)
    rows = memory.as_strided((4, width), (width, 1))
    x = torch.randn(1, block).bfloat16()
    order, inverse = torch.tensor([-2, -2, -1, 0]), torch.tensor([3])
    far = memory.as_strided((4, block), (width, 1))
    far.zero_()
    far[2] = 1
    permute_triton._gather[(2, 1)](
        x, order, inverse, rows, 1, 4, width, block, 1, TOP_K=1, TOKENS=1, SLOTS=4, BLOCK=block
    )
    assert torch.equal(far[3:], x) and not far[:3].any()
    y = torch.empty(1, block, dtype=torch.bfloat16)
    permute_triton._combine[(1, 1)](
        rows, inverse, y, 1, block, width, TOP_K=1, TOKENS=1, BLOCK=block
    )
    assert torch.equal(y, x)
