"""What is built from the products: the FP8 linear layer and SwiGLU."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from kernels.linear_fp8 import Fp8Linear, linear_fp8, linear_fp8_reference, quantized_once
from kernels.swiglu import swiglu, swiglu_backward_reference, swiglu_reference
from scripts.gpu_suite.harness import Check, Place, Timing
from scripts.gpu_suite.harness import measure as take_time

NAME = "layers"
LINEAR = [(8192, 7168, 4096), (16384, 2048, 7168)]
SWIGLU = [(16384, 2048), (65536, 768)]


def check(place: Place) -> Iterator[Check]:
    """Outputs and every gradient against the references, relative to the reference's norm."""
    torch.manual_seed(0)
    for T, D, N in ((130, 200, 300), (1, 128, 16)):
        x, w = torch.randn(T, D).bfloat16(), torch.randn(N, D).bfloat16()
        grad = torch.randn(T, N).bfloat16()
        pairs = zip(
            _gradients(linear_fp8, [x, w], grad, place.device),
            _gradients(linear_fp8_reference, [x, w], grad, place.device),
            strict=True,
        )
        for name, (ours, reference) in zip(("y", "dx", "dw"), pairs, strict=True):
            # a rounding of bf16 (2^-9) here and there
            yield Check(f"linear_fp8 {[T, D, N]} {name}", _relative(ours, reference), 5e-3)
    for R, F in ((5, 7), (300, 1025)):
        gate_up, weights = torch.randn(R, 2 * F).bfloat16(), torch.rand(R)
        grad = torch.randn(R, F).bfloat16()
        results = _gradients(swiglu, [gate_up, weights], grad, place.device)
        with torch.no_grad():
            expected = (
                swiglu_reference(gate_up, weights),
                *swiglu_backward_reference(grad, gate_up, weights),
            )
        for name, a, b in zip(("h", "dgate_up", "dweights"), results, expected, strict=True):
            assert b is not None
            yield Check(f"swiglu {[R, F]} {name}", _relative(a, b), 5e-3)


def measure(place: Place) -> Iterator[Timing]:
    """Forward and backward of the layer against bf16; SwiGLU against plain torch and a copy."""
    for T, D, N in place.shapes([*LINEAR]):
        ours = Fp8Linear(D, N, device=place.device, dtype=torch.bfloat16)
        peer = nn.Linear(D, N, bias=False, device=place.device, dtype=torch.bfloat16)
        x = torch.randn(T, D, device=place.device).bfloat16().requires_grad_()
        grad = torch.randn(T, N, device=place.device).bfloat16()

        def step(layer: nn.Module, x: Tensor = x, grad: Tensor = grad) -> None:
            torch.autograd.grad(layer(x), (x, *layer.parameters()), grad)

        with quantized_once(ours):
            yield take_time(
                f"linear {T}x{D}x{N}, forward and backward",
                {"ours": partial(step, ours), "bf16": partial(step, peer)},
                place,
                flops=6.0 * T * D * N,
            )
    for R, F in place.shapes([*SWIGLU]):
        gate_up = torch.randn(R, 2 * F, device=place.device).bfloat16()
        weights = torch.rand(R, device=place.device)
        moved = gate_up.numel() * 3
        half = torch.empty(moved // 2, dtype=torch.int8, device=place.device)
        target = torch.empty_like(half)
        yield take_time(
            f"swiglu {R}x{F}",
            {
                "ours": partial(swiglu, gate_up, weights),
                "plain torch": partial(swiglu_reference, gate_up, weights),
                "copy": partial(target.copy_, half),
            },
            place,
            bytes=moved,
        )


def _gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, device: torch.device
) -> list[Tensor]:
    leaves = [x.to(device).requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(device))]


def _relative(ours: Tensor, reference: Tensor) -> float:
    ours, reference = ours.cpu().double(), reference.cpu().double()
    return float((ours - reference).norm() / reference.norm())
