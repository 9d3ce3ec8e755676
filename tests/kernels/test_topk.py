"""`top_indices` against rows sorted in Python, including ties, with the implementations of both
devices."""

import pytest
import torch

from kernels.moe.topk import top_indices, top_indices_reference

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])]


def values(rows: int, width: int, levels: int) -> torch.Tensor:
    """Rows with about `levels` different values, some of them negative."""
    generator = torch.Generator().manual_seed(rows + width)
    steps = torch.randint(-levels // 2, levels // 2 + 1, (rows, width), generator=generator)
    return steps * 0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("levels", [1, 3, 10**6])
@pytest.mark.parametrize(("width", "k"), [(1, 1), (7, 3), (8, 8), (256, 8), (129, 22)])
def test_equals_go_by_index(device: str, levels: int, width: int, k: int) -> None:
    given = values(37, width, levels)
    found = top_indices(given.to(device), k).cpu()
    assert found.dtype == torch.int64 and torch.equal(found, top_indices_reference(given, k))


@pytest.mark.parametrize("device", DEVICES)
def test_masked_values_are_never_chosen_and_nothing_is_changed(device: str) -> None:
    given = values(50, 16, 4)
    given[:, 3::2] = float("-inf")
    before = given.clone()
    found = top_indices(given.to(device), 8).cpu()
    assert torch.equal(found, top_indices_reference(given, 8))
    assert torch.equal(given, before) and given.gather(1, found).isfinite().all()


def test_no_rows() -> None:
    assert top_indices(torch.empty(0, 8), 3).shape == (0, 3)


def test_zeros_of_both_signs_are_equal() -> None:
    assert top_indices(torch.tensor([[-0.0, 0.0, -0.0]]), 3).tolist() == [[0, 1, 2]]
