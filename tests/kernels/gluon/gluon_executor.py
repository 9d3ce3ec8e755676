"""Executes the source of `kernels.gemm.gemm_fp8_gluon` on a CPU, because Triton's interpreter does
not support Gluon.

The kernel's functions are called as plain Python, with Gluon's operations replaced by
implementations of the PTX manual. Shared memory and results start as NaN. The partitions of a
program run one at a time, in random order; a copy completes at a random time after it was issued, a
product at the end of its wait. Barriers count arrivals and bytes. So a wait for the wrong phase, a
slot released or refilled too early, and an access outside a tensor give wrong numbers or an error
for some seed. Layouts (checked by the compiler) and memory order between threads are not tested.
"""

import functools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.experimental.gluon import language as gluon_language
from triton.runtime.jit import JITFunction

from kernels.gemm import gemm_fp8_gluon, gemm_fp8_triton
from kernels.grouped_gemm import grouped_gemm_fp8_gluon


class Deadlock(AssertionError):
    """All partitions are waiting."""


class _Aborted(BaseException):
    pass


class Schedule:
    """Partitions of a program that run alternately in random order, each in a thread that blocks
    until its turn."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.pending: list[Callable[[], None]] = []
        """Copies in flight."""
        self.here = threading.Semaphore(0)
        self.part: SimpleNamespace
        self.aborted = False

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Yield to other partitions until `ready()` is true; called by a partition."""
        part = self.part
        part.ready = ready
        self.here.release()
        part.turn.acquire()
        if self.aborted:
            raise _Aborted

    def run(self, functions: list[Callable[[], None]]) -> None:
        """Run until all partitions have ended."""
        parts = [self._start(function) for function in functions]
        try:
            while any(not part.ended for part in parts):
                able = [part for part in parts if not part.ended and part.ready()]
                choice = self.random.randrange(len(able) + len(self.pending) or 1)
                if choice < len(able):
                    self.part = able[choice]
                    self.part.turn.release()
                    self.here.acquire()
                    if self.part.error:
                        raise self.part.error
                elif self.pending:
                    self.pending.pop(choice - len(able))()
                else:
                    raise Deadlock(f"{sum(not part.ended for part in parts)} parts wait")
            assert not self.pending, "a program ended before its copies"
        finally:
            self.aborted = True
            for part in parts:
                part.turn.release()
                part.thread.join()

    def _start(self, function: Callable[[], None]) -> SimpleNamespace:
        part = SimpleNamespace(
            turn=threading.Semaphore(0), ready=lambda: True, ended=False, error=None
        )

        def body() -> None:
            part.turn.acquire()
            try:
                if not self.aborted:
                    function()
            except _Aborted:
                pass
            except Exception as error:
                part.error = error
            part.ended = True
            self.here.release()

        part.thread = threading.Thread(target=body)
        part.thread.start()
        return part


class Barrier:
    """Complete a phase when all its arrivals and bytes have arrived, and start the next."""

    def __init__(self) -> None:
        self.count = self.arrivals = self.bytes = self.phase = 0

    def add(self, arrivals: int, bytes: int) -> None:
        """Count arrivals now, and add bytes to be awaited (negative: bytes that have arrived)."""
        assert self.count, "used before mbarrier.init"
        self.arrivals += arrivals
        self.bytes += bytes
        assert self.arrivals <= self.count, "more arrivals than the phase has"
        if self.arrivals == self.count and self.bytes == 0:
            self.arrivals, self.phase = 0, self.phase + 1


class Pointer:
    """An address, or a tensor of addresses, within the storage of one tensor."""

    def __init__(self, memory: Tensor, offset: Any) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, distance: Any) -> "Pointer":
        return Pointer(self.memory, self.offset + distance)

    @staticmethod
    def to(x: Tensor) -> "Pointer":
        """A pointer to the first element of x."""
        memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        return Pointer(memory, x.storage_offset())


class Shared:
    """A region of shared memory."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def index(self, i: int) -> "Shared":
        return Shared(self.data[i])

    def slice(self, start: int, length: int) -> "Shared":
        return Shared(self.data[start : start + length])

    def load(self, layout: object) -> Tensor:
        return self.data.clone()

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.data.permute(order))


class Barriers(list[Barrier]):
    """Barriers in shared memory."""

    def index(self, i: int) -> Barrier:  # type: ignore[override]
        return self[i]


def _allocate(dtype: torch.dtype, shape: list[int], layout: object) -> Any:
    if dtype == torch.int64:
        return Barriers(Barrier() for _ in range(shape[0]))
    return Shared(torch.full(shape, float("nan")).to(dtype))


def _load(at: Pointer, mask: Tensor | None = None, other: float = 0.0) -> Tensor:
    if mask is None:
        return at.memory[at.offset].clone()
    out = torch.full(mask.shape, other, dtype=at.memory.dtype)
    out[mask] = at.memory[at.offset.expand(mask.shape)[mask]]
    return out


def _store(at: Pointer, value: Tensor, mask: Tensor) -> None:
    assert value.dtype == at.memory.dtype and value.shape == mask.shape
    at.memory[at.offset[mask]] = value[mask]


def _language(program: int, programs: int, schedule: Schedule) -> SimpleNamespace:
    def warp_specialize(parts: list[Any], warps: list[int], registers: list[int]) -> None:
        assert len(parts) == len(warps) + 1 == len(registers) + 1
        schedule.run([functools.partial(function, *arguments) for function, arguments in parts])

    def nothing(*arguments: object, **options: object) -> None:
        pass

    return SimpleNamespace(
        constexpr=object, int64=torch.int64, float32=torch.float32, static_range=range,
        program_id=lambda axis: program, num_programs=lambda axis: programs,
        cdiv=lambda x, y: -(-x // y), arange=lambda start, end, layout: torch.arange(start, end),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        expand_dims=torch.unsqueeze, convert_layout=lambda x, layout: x, load=_load, store=_store,
        allocate_shared_memory=_allocate, warp_specialize=warp_specialize,
        where=torch.where, inline_asm_elementwise=lambda asm, constraints, args, **options: args[0],
        int32=torch.int32, NVMMADistributedLayout=nothing, SliceLayout=nothing,
        BlockedLayout=nothing,
        NVMMASharedLayout=gluon_language.NVMMASharedLayout,
    )  # fmt: skip


def _operations(schedule: Schedule) -> dict[str, Any]:
    def init(barrier: Barrier, count: int) -> None:
        barrier.count = count

    def wait(barrier: Barrier, parity: int) -> None:
        schedule.pause(lambda: barrier.phase & 1 != parity)

    def arrive(barrier: Barrier, count: int) -> None:
        barrier.add(count, 0)
        schedule.pause()

    def copy(source: Any, corner: list[int], barrier: Barrier, to: Shared) -> None:
        def happen() -> None:
            places = zip(corner, source.base.shape, strict=True)
            assert all(0 <= at < size for at, size in places), "a copy from beyond the tensor"
            lengths = to.data.shape
            part = source.base[
                tuple(slice(at, at + n) for at, n in zip(corner, lengths, strict=True))
            ]
            to.data.zero_()
            to.data[tuple(slice(n) for n in part.shape)] = part
            barrier.add(0, -to.data.numel() * to.data.element_size())

        schedule.pending.append(happen)
        schedule.pause()

    def multiply(a: Shared, b: Shared, acc: Tensor, use_acc: bool, is_async: bool) -> Any:
        assert not use_acc and is_async
        return lambda: a.data.float() @ b.data.float()

    def multiply_wait(outstanding: int, deps: tuple[Any]) -> Tensor:
        assert outstanding == 0
        schedule.pause()
        product: Tensor = deps[0]()
        return product

    return {
        "mbarrier": SimpleNamespace(
            init=init, wait=wait, arrive=arrive, MBarrierLayout=lambda: None,
            expect=lambda barrier, bytes: barrier.add(1, bytes),
        ),
        "fence_async_shared": lambda: None,
        "_load": copy, "warpgroup_mma": multiply, "warpgroup_mma_wait": multiply_wait,
    }  # fmt: skip


class _Kernel:
    """Replacement for the compiled kernel."""

    def __init__(self, function: Callable[..., None], seed: int, idle: int) -> None:
        self.function, self.seed, self.idle = function, seed, idle

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, **constants: Any) -> None:
            arguments[4].fill_(float("nan"))
            converted = [_argument(x) for x in arguments]
            programs = grid[0] + self.idle
            for program in range(programs):
                schedule = Schedule(self.seed + program)
                names = {"gl": _language(program, programs, schedule), **_operations(schedule)}
                with mock.patch.multiple(gemm_fp8_gluon, **names):
                    self.function(*converted, **constants)

        return launch


def _argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Pointer.to(x)
    if hasattr(x, "base"):
        return SimpleNamespace(
            base=x.base, dtype=x.base.dtype, layout=x.layout, block_shape=x.block_shape
        )
    return x


def _to_row_major(x_ERK: Tensor) -> Tensor:
    """`kernels.quantization.transpose_triton.to_row_major`, whose kernel is none of Gluon."""
    bytes_ERK = x_ERK.view(torch.uint8)
    return torch.nn.functional.pad(bytes_ERK, (0, -x_ERK.shape[2] % 16)).view(x_ERK.dtype)


@contextmanager
def executed(seed: int, idle: int = 0) -> Iterator[None]:
    """Context in which kernel launches run here. idle: programs in addition to those that the
    launcher requests."""
    plain = {
        name: function.fn
        for name, function in vars(gemm_fp8_gluon).items()
        if isinstance(function, JITFunction) and name != "_gemm"
    }
    kernel = _Kernel(gemm_fp8_gluon._gemm.fn, seed, idle)
    with (
        mock.patch.multiple(gemm_fp8_gluon, _gemm=kernel, **plain),
        mock.patch.object(gemm_fp8_triton, "to_row_major", _to_row_major),
        mock.patch.object(grouped_gemm_fp8_gluon, "to_row_major", _to_row_major),
    ):
        yield
