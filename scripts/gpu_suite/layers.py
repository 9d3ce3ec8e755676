"""Layers built from the products: the FP8 linear layer and SwiGLU."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.gemm.linear_fp8 import Fp8Weight, linears_fp8, linears_fp8_reference
from kernels.mlp.swiglu import (
    Activation,
    swiglu,
    swiglu_backward,
    swiglu_backward_quantized,
    swiglu_backward_quantized_reference,
    swiglu_backward_reference,
    swiglu_quantized,
    swiglu_reference,
)
from kernels.quantization.quantize import quantize_1x128, quantize_1x128_128x1, quantize_128x1
from scripts.gpu_suite.harness import Check, Place, Timing
from scripts.gpu_suite.harness import measure as take_time

LINEAR = [(8192, 7168, 4096), (16384, 2048, 7168)]
SWIGLU = [(16384, 2048), (65536, 768)]
ACTIVATIONS: tuple[Activation, ...] = ("swiglu", "clamped_swiglu")


def check(place: Place) -> Iterator[Check]:
    """Check outputs and every gradient against the references, relative to the reference's norm."""
    torch.manual_seed(0)
    for T, D, N in ((130, 200, 300), (1, 128, 16)):
        x, w = torch.randn(T, D).bfloat16(), torch.randn(N, D).bfloat16()
        grad = torch.randn(T, N).bfloat16()
        pairs = zip(
            _gradients(_linear, [x, w], grad, place.device),
            _gradients(partial(_linear, linears=linears_fp8_reference), [x, w], grad, place.device),
            strict=True,
        )
        for name, (ours, reference) in zip(("y", "dx", "dw"), pairs, strict=True):
            # some roundings of bf16 (2^-9)
            yield Check(f"linears_fp8 {[T, D, N]} {name}", _relative(ours, reference), 5e-3)
    for R, F in ((5, 7), (300, 1025), (260, 256)):
        for activation in ACTIVATIONS:
            yield from _check_swiglu(R, F, activation, place.device)


def measure(place: Place) -> Iterator[Timing]:
    """Time forward and backward of the layer against bf16; SwiGLU against plain torch, against the
    same in several passes, and against a copy of the same number of bytes."""
    for T, D, N in place.shapes([*LINEAR]):
        weight = torch.randn(N, D, device=place.device).bfloat16().requires_grad_()
        quantized = Fp8Weight.of(weight)  # once per optimizer step
        x = torch.randn(T, D, device=place.device).bfloat16().requires_grad_()
        grad = torch.randn(T, N, device=place.device).bfloat16()
        layers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "ours": partial(_linear, fp8_weight=quantized), "bf16": torch.nn.functional.linear,
        }  # fmt: skip

        def step(
            layer: Callable[[Tensor, Tensor], Tensor],
            leaves: tuple[Tensor, Tensor] = (x, weight),
            grad: Tensor = grad,
        ) -> None:
            torch.autograd.grad(layer(*leaves), leaves, grad)

        yield take_time(
            f"linear {T}x{D}x{N}, forward and backward",
            {name: partial(step, layer) for name, layer in layers.items()},
            place,
            flops=6.0 * T * D * N,
        )
    for R, F in place.shapes([*SWIGLU]):
        yield from _measure_swiglu(R, F, place)


def _linear(
    x: Tensor, w: Tensor, fp8_weight: Fp8Weight | None = None,
    linears: Callable[..., tuple[Tensor, ...]] = linears_fp8,
) -> Tensor:  # fmt: skip
    """One layer; its weight is quantized here unless it already is."""
    (y,) = linears(x, [w], [fp8_weight or Fp8Weight.of(w)])
    return y


def _check_swiglu(R: int, F: int, activation: Activation, device: torch.device) -> Iterator[Check]:
    gate_up, weights = 3 * torch.randn(R, 2 * F).bfloat16(), torch.rand(R)
    grad, case = torch.randn(R, F).bfloat16(), f"{activation} {[R, F]}"
    results = _gradients(partial(swiglu, activation=activation), [gate_up, weights], grad, device)
    with torch.no_grad():
        expected = swiglu_backward_reference(grad, gate_up, weights, activation, True)
    for name, a, b in zip(
        ("dgate_up", "dweights", "h"), (*results[1:], results[0]), expected, strict=True
    ):
        yield Check(f"{case} {name}", _relative(a, b), 5e-3)
    ends, counts = torch.tensor([R // 3, R // 3, R]), torch.tensor([R // 3, 0, R - R // 3 - 2])
    stored = quantize_1x128(gate_up)
    for form, source, scales in (
        ("bf16", gate_up, None), ("FP8", stored.data, stored.scales),
    ):  # fmt: skip
        wanted = swiglu_backward_quantized_reference(
            grad, source, weights, activation, False, ends, counts, scales
        )
        found = swiglu_backward_quantized(
            grad.to(device), source.to(device), weights.to(device), activation, False,
            ends.to(device), counts.to(device), None if scales is None else scales.to(device),
        )  # fmt: skip
        for name, ours, reference in zip(found._fields[:3], found[:3], wanted[:3], strict=True):
            # a value at a border of FP8's grid (2^-4) is rounded to the other side
            for part, a, b in zip(("", " scales"), ours, reference, strict=True):
                yield Check(f"{case} from {form} {name}{part}", _relative(a, b), 1e-2)
    here = gate_up.to(device), weights.to(device)
    ours, in_turn = swiglu_quantized(*here, activation), quantize_1x128(swiglu(*here, activation))
    differs = (ours.data.float() != in_turn.data.float()).float().mean()
    yield Check(f"{case} to FP8 differs from both in turn", float(differs), 1e-3)


def _measure_swiglu(R: int, F: int, place: Place) -> Iterator[Timing]:
    gate_up = torch.randn(R, 2 * F, device=place.device).bfloat16()
    grad, weights = gate_up[:, :F].contiguous(), torch.rand(R, device=place.device)
    ends = torch.arange(1, 9, device=place.device) * (R // 8)
    counts = torch.full_like(ends, R // 8)
    stored = quantize_1x128(gate_up)

    def in_turn() -> None:
        grad_gate_up, _, h = swiglu_backward(grad, gate_up, weights, with_h=True)
        quantize_1x128_128x1(grad_gate_up)
        quantize_128x1(h)

    def backward(source: Tensor, scales: Tensor | None) -> object:
        return swiglu_backward_quantized(
            grad, source, weights, ends_E=ends, counts_E=counts, scales=scales
        )

    n = R * F
    rows: list[tuple[str, int, dict[str, Callable[[], object]]]] = [
        ("swiglu", 6 * n, {
            "ours": partial(swiglu, gate_up, weights),
            "plain torch": partial(swiglu_reference, gate_up, weights),
        }),
        ("swiglu to FP8", 5 * n, {
            "ours": partial(swiglu_quantized, gate_up, weights),
            "in turn": lambda: quantize_1x128(swiglu(gate_up, weights)),
        }),
        ("swiglu backward and h", 12 * n, {
            "ours": partial(swiglu_backward, grad, gate_up, weights, "swiglu", True),
            "plain torch": partial(
                swiglu_backward_reference, grad, gate_up, weights, "swiglu", True
            ),
        }),
        ("swiglu backward to FP8", 11 * n, {
            "ours": partial(backward, gate_up, None), "in turn, without groups": in_turn,
        }),
        ("swiglu backward, FP8 to FP8", 9 * n, {"ours": partial(backward, *stored)}),
    ]  # fmt: skip
    for name, moved, forms in rows:
        half = torch.empty(moved // 2, dtype=torch.int8, device=place.device)
        copy = partial(torch.empty_like(half).copy_, half)
        yield take_time(f"{name} {R}x{F}", forms | {"copy": copy}, place, bytes=moved)


def _gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, device: torch.device
) -> list[Tensor]:
    leaves = [x.to(device).requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(device))]


def _relative(ours: Tensor, reference: Tensor) -> float:
    ours, reference = (x.detach().cpu().double() for x in (ours, reference))
    return float((ours - reference).norm() / reference.norm())
