"""The same kernels on a CUDA device, against the references on the CPU."""

import pytest
import torch
from torch import Tensor

from kernels.grouped_gemm.grouped_gemm import (
    Implementation,
    grouped_gemm_nt,
    grouped_gemm_nt_reference,
)
from kernels.layers.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kernels.mlp.swiglu import swiglu, swiglu_reference

pytestmark = pytest.mark.gpu
BF16 = 1e-2


def relative(ours: Tensor, reference: Tensor) -> float:
    difference = ours.detach().cpu().double() - reference.detach().double()
    return float(difference.norm() / reference.detach().double().norm())


@pytest.mark.parametrize("shape", [(5, 14), (1000, 2 * 1025), (0, 6)], ids=str)
def test_swiglu(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    gate_up, weights = torch.randn(shape).bfloat16(), torch.rand(shape[0])
    grad = torch.randn(shape[0], shape[1] // 2).bfloat16()
    results = []
    for device, function in (("cuda", swiglu), ("cpu", swiglu_reference)):
        inputs = [x.to(device).requires_grad_() for x in (gate_up, weights)]
        out = function(inputs[0], inputs[1])
        results.append([out, *torch.autograd.grad(out, inputs, grad.to(device))])
    for ours, reference in zip(*results, strict=True):
        assert ours.numel() == 0 or relative(ours, reference) < BF16


@pytest.mark.parametrize("implementation", [None, "triton"])
def test_grouped_gemm(implementation: Implementation | None) -> None:
    torch.manual_seed(0)
    counts = torch.tensor([100, 0, 17, 300])
    x, w = torch.randn(417, 128).bfloat16(), torch.randn(4, 256, 128).bfloat16()
    reference = grouped_gemm_nt_reference(x, w, counts.cumsum(0), counts)
    ends = counts.cumsum(0).cuda()
    y = grouped_gemm_nt(x.cuda(), w.cuda(), ends, counts.cuda(), implementation)
    assert relative(y, reference) < BF16


def test_linear_cross_entropy() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(300, 64).bfloat16(), torch.randn(1000, 64).bfloat16()
    targets = torch.randint(0, 1000, (300,))
    results = []
    for device, function in (
        ("cuda", linear_cross_entropy),
        ("cpu", linear_cross_entropy_reference),
    ):
        leaves = [t.to(device).requires_grad_() for t in (x, w)]
        loss = function(leaves[0], leaves[1], targets.to(device))
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for ours, reference in zip(*results, strict=True):
        assert relative(ours, reference) < 3 * BF16
