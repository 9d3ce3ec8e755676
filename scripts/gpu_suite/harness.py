"""Common parts of the sections: the device, comparison of results, timing.

Timing: the implementations of one row alternate, each run after the L2 cache was overwritten; a row
shows medians. With alternation, a clock that decreases with temperature affects all equally.

A kernel's time must not contain the time of Python, which needs 40 to 220 us for a call of ours. So
the device is first kept busy by a kernel that only waits, long enough for the host to enqueue the
timed work behind it, and the start is recorded after that kernel. If the device reached the start
before the host had enqueued everything, the run is repeated with a longer wait; what still is not
enqueued in time (it reads results on the host) is reported as bound by the host.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

TILE = 128
_CLOCK_HZ = 2e9
"""At least the clock of the device: its cycles are the unit of the waiting kernel."""
_TRIES = 4
FAKE_MS = 1.0
"""Every time of a dry run."""


@dataclass(frozen=True)
class Place:
    """Device and size of the suite."""

    device: torch.device
    dry_run: bool
    """Tiny shapes, on a CPU, and invented times: checks that the suite runs, measures nothing."""
    rounds: int = 20
    share: tuple[int, int] | None = None
    """(i, n): nothing is timed, and `measure` runs the i-th of every n rows once, so that its
    kernels are compiled."""
    failed: frozenset[str] = frozenset()
    """Sections whose checks failed."""
    _rows: "count[int]" = field(default_factory=count)

    def shapes(self, full: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Shapes to measure; two small ones in a dry run."""
        small = [tuple(-(-size // 64) for size in shape) for shape in full[:2]]
        return small if self.dry_run else full

    @property
    def compiles_only(self) -> bool:
        return self.share is not None

    def is_next_mine(self) -> bool:
        """Whether the next row is in this share."""
        return self.share is None or next(self._rows) % self.share[1] == self.share[0]


@dataclass(frozen=True)
class Check:
    """One value and its limit."""

    case: str
    figure: float
    limit: float

    @property
    def passed(self) -> bool:
        """False for NaN."""
        return self.figure <= self.limit


@dataclass(frozen=True)
class Timing:
    """Implementations of one operation on one shape; the first is ours."""

    case: str
    milliseconds: dict[str, float]
    flops: float | None = None
    bytes: float | None = None
    missing: dict[str, str] = field(default_factory=dict)
    """Peers that could not run, and why."""
    host_bound: tuple[str, ...] = ()
    """Implementations whose time contains waiting for the host."""

    def rate(self, name: str) -> str:
        """TFLOP/s or GB/s."""
        seconds = self.milliseconds[name] / 1e3
        if self.flops is not None:
            return f"{self.flops / seconds / 1e12:,.0f} TFLOP/s"
        return f"{(self.bytes or 0) / seconds / 1e9:,.0f} GB/s"

    def lines(self) -> Iterator[str]:
        """Markdown rows: time, rate, and our speed as a multiple of the peer's."""
        ours = next(iter(self.milliseconds.values()))
        for name, milliseconds in self.milliseconds.items():
            ratio, note = f"{milliseconds / ours:.2f}", " (host)" * (name in self.host_bound)
            rate = self.rate(name)
            yield f"| {self.case} | {name}{note} | {milliseconds:.4f} | {rate} | {ratio} |"
        for name, reason in self.missing.items():
            yield f"| {self.case} | {name} | not run: {reason} | | |"


def tile_difference(ours: Tensor, exact: Tensor) -> float:
    """Largest `1 - 2<x,y> / (<x,x> + <y,y>)` over tiles of 128x128, in fp64.

    It is per tile, so that neither one bad tile nor one wrong scale can be missed in a large
    matrix. NaN if either is NaN; two zero tiles differ by 0.
    """
    x, y = ours.double(), exact.double()
    assert x.shape == y.shape, (x.shape, y.shape)
    if not x.numel():
        return 0.0
    overlap, norms = _tile_sums(x * y), _tile_sums(x * x) + _tile_sums(y * y)
    difference = torch.where(norms == 0, 0.0, 1 - 2 * overlap / norms)
    return float("nan") if bool(difference.isnan().any()) else float(difference.max())


def _tile_sums(x: Tensor) -> Tensor:
    rows, columns = x.shape
    x = torch.nn.functional.pad(x, (0, -columns % TILE, 0, -rows % TILE))
    return x.view(x.shape[0] // TILE, TILE, x.shape[1] // TILE, TILE).sum((1, 3))


def measure(
    case: str, implementations: dict[str, Callable[[], object]], place: Place,
    flops: float | None = None, bytes: float | None = None,
) -> Timing:  # fmt: skip
    """Median time of each; a peer that raises is left out, with its reason. Ours may not raise."""
    missing: dict[str, str] = {}
    running = {}
    if place.compiles_only:
        own = {name: run for name, run in implementations.items() if name.startswith("ours")}
        implementations = own if place.is_next_mine() else {}
    for i, (name, run) in enumerate(implementations.items()):
        try:
            for _ in range(1 if place.dry_run or place.compiles_only else 2):
                run()
            _synchronize(place)
            running[name] = run
        except Exception as error:
            if i == 0:
                raise
            missing[name] = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
    if place.device.type != "cuda" or place.compiles_only:
        return Timing(case, dict.fromkeys(running, FAKE_MS), flops, bytes, missing)
    clocks = {name: _Clock(run, place.device) for name, run in running.items()}
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(place.rounds):
        for name, clock in clocks.items():
            times[name].append(clock.milliseconds())
    medians = {name: statistics.median(values) for name, values in times.items()}
    late = tuple(name for name, clock in clocks.items() if clock.is_host_bound)
    return Timing(case, medians, flops, bytes, missing, late)


_flush: list[Tensor] = []


class _Clock:
    """Times a function on the device, without the host's time."""

    def __init__(self, run: Callable[[], object], device: torch.device) -> None:
        self.run, self.is_host_bound = run, False
        if not _flush:
            _flush.append(torch.empty(2**28, dtype=torch.int8, device=device))
        torch.cuda.synchronize(device)
        start_s = time.perf_counter()
        run()
        self.wait_s = 2 * (time.perf_counter() - start_s) + 50e-6

    def milliseconds(self) -> float:
        """The device's time of one run."""
        for _ in range(1 if self.is_host_bound else _TRIES):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            _flush[0].zero_()
            torch.cuda._sleep(int(self.wait_s * _CLOCK_HZ))
            start.record()
            self.run()
            was_late = start.query()
            end.record()
            end.synchronize()
            if not was_late:
                return start.elapsed_time(end)
            self.wait_s = min(2 * self.wait_s, 20e-3)
        self.is_host_bound = True
        return start.elapsed_time(end)


def _synchronize(place: Place) -> None:
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)
