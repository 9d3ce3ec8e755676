"""Largest values, norm and clipping on one rank; meshes are in tests/parallel/mesh."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from parallel.grad_norm import global_grad_norm, in_range, largest_values, scale_grads


@pytest.fixture(autouse=True)
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_largest_value_has_any_sign_and_is_nan_if_there_is_one() -> None:
    inf = math.inf
    rows = [[-3.0, 2.0], [1.0, 4.0], [], [-inf, 1.0], [inf], [0.0, math.nan, inf], [-1e30]]
    values = [torch.tensor(row).repeat(100) for row in rows]
    found = largest_values(values)
    assert found.tolist() == pytest.approx([3, 4, 0, inf, inf, math.nan, 1e30], nan_ok=True)
    assert [bool(in_range(value)) for value in found] == [True] * 3 + [False] * 4


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    torch.manual_seed(0)
    made = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape)
    return made


def test_the_norm_is_that_in_double_precision() -> None:
    """The second gradient is summed in several pieces, the last of them incomplete."""
    made = parameters((7,), (613, 1201), (0, 3), ())
    flat = torch.cat([p.grad.double().flatten() for p in made if p.grad is not None])
    assert float(global_grad_norm(made, 0)) == pytest.approx(float(flat.norm()), rel=1e-7)


def test_only_a_norm_above_the_limit_is_scaled() -> None:
    (parameter,) = parameters((5, 3))
    assert parameter.grad is not None
    before, norm = parameter.grad.clone(), global_grad_norm([parameter], 0)
    scale_grads([parameter], norm, 2 * float(norm))
    assert torch.equal(parameter.grad, before)
    scale_grads([parameter], norm, float(norm) / 4)
    torch.testing.assert_close(parameter.grad, before / 4, rtol=1e-5, atol=0.0)
