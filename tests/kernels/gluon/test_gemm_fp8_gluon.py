"""The Gluon kernel's source, executed on a CPU; and the cases in which it is refused."""

import builtins
import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels.gemm import gemm_fp8, gemm_fp8_gluon
from kernels.gemm.gemm_fp8_triton import Target
from kernels.quantization.quantize import quantize_1x128, quantize_128x1, quantize_128x128
from tests.kernels.gluon.gluon_executor import Barrier, Deadlock, Schedule, executed

PRODUCTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "nt": (gemm_fp8.gemm_fp8_nt, gemm_fp8.gemm_fp8_nt_reference),
    "nn": (gemm_fp8.gemm_fp8_nn, gemm_fp8.gemm_fp8_nn_reference),
    "tn": (gemm_fp8.gemm_fp8_tn, gemm_fp8.gemm_fp8_tn_reference),
}

gemm_fp8_nt, gemm_fp8_nt_reference = PRODUCTS["nt"]


def hopper(n_sm: int) -> Target:
    return Target(n_sm=n_sm, shared_bytes=232448, amd=False, descriptors=True, hopper=True)


def operands(layout: str, M: int, N: int, K: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    a, b = torch.randn(M, K), torch.randn(N, K) * 2.0 ** torch.randint(-9, 9, (N, 1))
    if layout == "tn":
        return (*quantize_128x1(a.T), *quantize_128x1(b.T))
    weight, other_way = quantize_128x128(b if layout == "nt" else b.T)
    data = weight.data if layout == "nt" else other_way
    return (*quantize_1x128(a), data, weight.scales)


@contextlib.contextmanager
def on(target: Target) -> Iterator[None]:
    """Make the public functions use their GPU implementation."""
    with (
        mock.patch.object(gemm_fp8.device, "on_accelerator", lambda x: True),
        mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()),
        mock.patch.object(Target, "current", lambda: target),
    ):
        yield


def run(
    layout: str, arguments: tuple[Tensor, ...], out_dtype: torch.dtype = torch.float32,
    n_sm: int = 2, seed: int = 0, idle: int = 0,
) -> Tensor:  # fmt: skip
    with on(hopper(n_sm)), executed(seed, idle):
        return PRODUCTS[layout][0](*arguments, out_dtype, implementation="gluon")


def relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize("layout", PRODUCTS)
@pytest.mark.parametrize(
    "M, N, K, n_sm",
    [
        (1, 1, 1, 132),
        (140, 260, 300, 132),  # one tile per program, 3 steps: fewer than slots
        (140, 260, 300, 4),  # one tile or two
        (140, 140, 1700, 1),  # 4 tiles of 14 steps: the ring is used 9 times
        (1100, 129, 64, 3),  # more rows of tiles than a group has
    ],
)
def test_products(layout: str, M: int, N: int, K: int, n_sm: int) -> None:
    arguments = operands(layout, M, N, K)
    reference = PRODUCTS[layout][1](*arguments, torch.float32)
    assert relative(run(layout, arguments, n_sm=n_sm), reference) < 1e-6  # sums in another order


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_events(seed: int) -> None:
    """12 orders, every number of steps from 2 to 13 (the ring twice and one more), 9 tiles."""
    arguments = operands("nt", 260, 270, 128 * (seed + 2) - 40)
    reference = gemm_fp8_nt_reference(*arguments, torch.float32)
    assert relative(run("nt", arguments, n_sm=1 + seed % 3, seed=seed), reference) < 1e-6


def test_programs_without_tiles_end() -> None:
    arguments = operands("nt", 130, 10, 200)
    reference = gemm_fp8_nt_reference(*arguments, torch.float32)
    assert relative(run("nt", arguments, idle=3), reference) < 1e-6


@pytest.mark.parametrize("layout", PRODUCTS)
def test_rounds_once(layout: str) -> None:
    arguments = operands(layout, 130, 70, 200)
    exact = run(layout, arguments)
    assert torch.equal(run(layout, arguments, torch.bfloat16), exact.bfloat16())


def test_writes_its_output_and_no_more() -> None:
    arguments = operands("nt", 130, 70, 200)
    frame = torch.randn(134, 80)  # the result is a part of it
    expected = frame.clone()
    expected[2:132, 5:75] = run("nt", arguments)
    a, scales_a, b, scales_b = arguments
    with on(hopper(2)), executed(0):
        gemm_fp8_gluon.gemm(a, scales_a, b, scales_b, frame[2:132, 5:75])
    assert torch.equal(frame, expected)


@pytest.mark.parametrize("layout", PRODUCTS)
def test_other_memory_orders(layout: str) -> None:
    arguments = operands(layout, 70, 200, 137)
    reference = PRODUCTS[layout][1](*arguments, torch.float32)
    plain = tuple(x.contiguous() for x in arguments)
    assert relative(run(layout, plain), reference) < 1e-6


def test_nan_stays_where_it_belongs() -> None:
    a, b = torch.randn(140, 300), torch.randn(200, 300)
    a[3, 5] = b[130, 299] = math.inf
    rows, (weight, _) = quantize_1x128(a), quantize_128x128(b)
    expected = torch.zeros(140, 200, dtype=torch.bool)
    expected[3] = expected[:, 128:] = True
    assert torch.equal(run("nt", (*rows, *weight)).isnan(), expected)


def test_a_deadlock_is_seen() -> None:
    """Tests the executor itself."""
    schedule, barrier = Schedule(0), Barrier()
    with pytest.raises(Deadlock):
        schedule.run([lambda: schedule.pause(lambda: barrier.phase == 1)])


def test_too_few_slots_released_is_seen() -> None:
    """A loader that waits for three groups where there are two stops when the ring is full."""
    arguments = operands("nt", 10, 10, 128 * (gemm_fp8_gluon.SLOTS[128] + 1))
    shipped = Barrier.add

    def add(self: Barrier, arrivals: int, bytes: int) -> None:
        self.count = 3 if self.count == 2 else self.count
        shipped(self, arrivals, bytes)

    with mock.patch.object(Barrier, "add", add), pytest.raises(Deadlock):
        run("nt", arguments)


def test_refusals() -> None:
    arguments = operands("nt", 10, 20, 30)
    with pytest.raises(ValueError, match="'gluon' needs a Hopper GPU, a is on cpu"):
        gemm_fp8_nt(*arguments, implementation="gluon")
    with pytest.raises(ValueError, match="implementation is 'cutlass', must be"):
        gemm_fp8_nt(*arguments, implementation="cutlass")
    blackwell = Target(n_sm=2, shared_bytes=232448, amd=False, descriptors=True)
    with on(blackwell), pytest.raises(ValueError, match="needs a Hopper GPU"):
        gemm_fp8_nt(*arguments, implementation="gluon")


def test_triton_without_gluon_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = operands("nt", 10, 20, 30)
    monkeypatch.delitem(sys.modules, "kernels.gemm.gemm_fp8_gluon")
    shipped = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.startswith("triton.experimental"):
            raise ImportError(f"no module named {name}")
        return shipped(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with on(hopper(2)), pytest.raises(ValueError, match=r"as Triton 3.6 to 3.9 have it: no module"):
        gemm_fp8_nt(*arguments, implementation="gluon")
