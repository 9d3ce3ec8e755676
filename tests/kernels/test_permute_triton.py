"""The Triton kernel of `combine_rows` against its reference, in Triton's interpreter and on CUDA.

The interpreter runs in a process of its own, in fp32 (it rounds bf16 wrongly); outputs are poisoned
with NaN.
"""

import pytest
import torch

from kernels.permute import combine_rows, combine_rows_reference, gather_rows, permutation
from tests.runs import run

CHECK = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from kernels.permute import combine_rows_reference, permutation
from kernels.permute_triton import combine

torch.manual_seed(0)
new_empty = torch.Tensor.new_empty
def poisoned(*a, **k):
    out = new_empty(*a, **k)
    return out.fill_(float("nan")) if out.is_floating_point() else out
torch.Tensor.new_empty = poisoned
for tokens, top_k, width in [(1, 2, 1), (3, 2, 7), (4, 3, 1024), (2, 5, 1025), (0, 2, 8)]:
    for experts, absent in ((4, 0.0), (2, 0.5)):
        ids = torch.randint(0, experts, (tokens, top_k))
        ids[torch.rand(tokens, top_k) < absent] = experts
        n_rows = int((ids < experts).sum())
        to = permutation(ids, experts, n_rows=n_rows)
        if n_rows or not tokens:
            rows = torch.randn(n_rows, width)
            ours = combine(rows, to.inverse_R, to.absent_R, top_k)
            torch.testing.assert_close(ours, combine_rows_reference(rows, to, top_k))
print("all equal")
"""


def test_combine() -> None:
    assert "all equal" in run("-c", CHECK).stdout


@pytest.mark.gpu
@pytest.mark.parametrize("absent", [0.0, 0.4])
def test_combine_and_gather_on_cuda(absent: float) -> None:
    torch.manual_seed(0)
    ids = torch.stack([torch.randperm(16)[:6] for _ in range(1000)])
    ids[torch.rand(ids.shape) < absent] = 16
    x = torch.randn(1000, 1030).bfloat16()
    to = permutation(ids, 16, n_rows=int((ids < 16).sum()))
    on_device = permutation(ids.cuda(), 16, n_rows=int((ids < 16).sum()))
    rows = gather_rows(x, to)
    assert torch.equal(gather_rows(x.cuda(), on_device).cpu(), rows)
    expected = combine_rows_reference(rows, to, 6)
    ours = combine_rows(rows.cuda(), on_device, 6).cpu()
    assert (ours.float() - expected.float()).norm() < 1e-2 * expected.float().norm()
