"""RMSNorm, RoPE and the losses of a chunk of tokens, which are limited by memory bandwidth only."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layers.cross_entropy import (
    FOREIGN,
    IGNORE,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    token_losses_,
    token_losses_reference_,
)
from kernels.layers.norm import rms_norm, rms_norm_backward_reference, rms_norm_reference
from kernels.layers.rope import rotate, rotate_reference
from scripts.gpu_suite.harness import Check, Place, Timing
from scripts.gpu_suite.harness import measure as take_time

NORM = [(16384, 7168), (65536, 2048), (1048576, 128)]
ROTATION = [(16384, 128, 32), (32768, 32, 64)]
"""Tokens, heads, pairs."""
LOSS = [(2048, 129280), (1024, 151936)]
EPS = 1e-6
Forms = dict[str, Callable[[], object]]
_ROUNDING = 5e-3
"""Some roundings of bf16 (2^-9)."""


def check(place: Place) -> Iterator[Check]:
    """Compare with the references on the CPU, relative to their norm."""
    torch.manual_seed(0)
    for R, D in ((1, 2), (300, 64), (37, 1025), (20, 7168)):
        yield from _check_norm(R, D, place.device)
    for T, H, C in ((1, 1, 2), (130, 3, 64), (33, 5, 10)):
        for interleaved in (False, True):
            x = torch.randn(T, H, C + 6).bfloat16()[..., 6:]
            tables = torch.randn(T, C // 2), torch.randn(T, C // 2)
            expected = rotate_reference(x, *tables, interleaved)
            here = [t.to(place.device) for t in (x, *tables)]
            ours = rotate(here[0], here[1], here[2], interleaved)
            case = f"rotate {[T, H, C]}{' interleaved' if interleaved else ''}"
            yield Check(case, _relative(ours, expected), _ROUNDING)
    for T, V in ((1, 3), (50, 5000)):
        yield from _check_loss(T, V, place.device)


def measure(place: Place) -> Iterator[Timing]:
    """Compare with plain torch, and with a copy of the same number of bytes."""
    for R, D in place.shapes([*NORM]):
        x = torch.randn(R, D, device=place.device).bfloat16()
        weight = torch.ones(D, device=place.device).bfloat16()
        _, rstd = rms_norm_reference(x[:1], weight, EPS)
        rstd = rstd.expand(R).contiguous()
        peer = partial(F.rms_norm, x, (D,), weight, EPS)
        forward: Forms = {"ours": partial(rms_norm, x, weight, EPS), "torch": peer}
        yield _time(f"rms_norm {R}x{D}", forward, 2 * x.nbytes, place)
        backward: Forms = {
            "ours": partial(torch.ops.phalanx.rms_norm_backward, x, x, weight, rstd),
            "plain torch": partial(rms_norm_backward_reference, x, x, weight, rstd),
        }
        yield _time(f"rms_norm backward {R}x{D}", backward, 3 * x.nbytes, place)
    for T, H, pairs in place.shapes([*ROTATION]):
        C = 2 * pairs
        x, table = torch.randn(T, H, C, device=place.device).bfloat16(), torch.ones(T, C // 2)
        table = table.to(place.device)
        for interleaved in (False, True):
            forms: Forms = {
                "ours": partial(rotate, x, table, table, interleaved),
                "plain torch": partial(rotate_reference, x, table, table, interleaved),
            }
            case = f"rotate {T}x{H}x{C}{' interleaved' if interleaved else ''}"
            yield _time(case, forms, 2 * x.nbytes, place)
    for T, V in place.shapes([*LOSS]):
        logits = torch.randn(T, V, device=place.device).bfloat16()
        targets = torch.zeros(T, dtype=torch.int64, device=place.device)
        forms = {
            "ours": partial(token_losses_, logits, targets, None, 0.0, True),
            "plain torch": partial(token_losses_reference_, logits, targets, None, 0.0, True),
        }
        yield _time(f"token losses and gradient {T}x{V}", forms, 2 * logits.nbytes, place)


def _check_norm(R: int, D: int, device: torch.device) -> Iterator[Check]:
    x, grad = torch.randn(R, D).bfloat16(), torch.randn(R, D).bfloat16()
    weight = torch.randn(D).bfloat16()
    y, rstd = rms_norm_reference(x, weight, EPS)
    expected = (y, *rms_norm_backward_reference(grad, x, weight, rstd))
    x, grad, weight, rstd = (t.to(device) for t in (x, grad, weight, rstd))
    backward = torch.ops.phalanx.rms_norm_backward(grad, x, weight, rstd)
    found = (rms_norm(x, weight, EPS), *backward)
    for name, a, b in zip(("y", "dx", "dweight"), found, expected, strict=True):
        # with two elements the gradient is the remainder of a difference
        yield Check(f"rms_norm {[R, D]} {name}", _relative(a, b), _ROUNDING if D > 2 else 0.1)
    again = torch.ops.phalanx.rms_norm_backward(grad, x, weight, rstd)
    same = all(map(torch.equal, backward, again))
    yield Check(f"rms_norm backward {[R, D]} twice, differs", float(not same), 0.0)


def _check_loss(T: int, V: int, device: torch.device) -> Iterator[Check]:
    logits, targets = 3 * torch.randn(T, V), torch.randint(0, V, (T,))
    targets[1::4], targets[2::4] = IGNORE, FOREIGN
    for z in (0.0, 1e-2):
        ours, reference = logits.bfloat16().to(device), logits.bfloat16()
        found = (*token_losses_(ours, targets.to(device), None, z, True), ours)
        expected = (*token_losses_reference_(reference, targets, None, z, True), reference)
        for name, a, b in zip(("logsumexp", "loss", "gradient"), found, expected, strict=True):
            limit = _ROUNDING if name == "gradient" else 1e-5
            yield Check(f"token losses {[T, V]} z {z} {name}", _relative(a, b), limit)
    x, w = torch.randn(T, 64).bfloat16(), torch.randn(V, 64).bfloat16()
    loss = linear_cross_entropy(x.to(device), w.to(device), targets.clamp(min=IGNORE).to(device))
    exact = linear_cross_entropy_reference(x, w, targets.clamp(min=IGNORE))
    yield Check(f"linear_cross_entropy {[T, V]}", _relative(loss, exact), 1e-3)


def _time(case: str, forms: Forms, moved: int, place: Place) -> Timing:
    half = torch.empty(moved // 2, dtype=torch.int8, device=place.device)
    target = torch.empty_like(half)
    return take_time(case, forms | {"copy": partial(target.copy_, half)}, place, bytes=moved)


def _relative(ours: Tensor, reference: Tensor) -> float:
    ours, reference = ours.detach().cpu().double(), reference.double()
    return float((ours - reference).norm() / reference.norm().clamp(min=1e-30))
