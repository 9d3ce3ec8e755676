"""Common parts of the sections: the device, comparison of results, timing.

Timing: the implementations of one row alternate, each run after the L2 cache was overwritten; a row
shows medians. With alternation, a clock that decreases with temperature affects all equally.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

TILE = 128


@dataclass(frozen=True)
class Place:
    """Device and size of the suite."""

    device: torch.device
    dry_run: bool
    """Tiny shapes, on a CPU: checks that the suite runs, measures nothing."""
    rounds: int = 20

    def shapes(self, full: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Shapes to measure; two small ones in a dry run."""
        small = [tuple(-(-size // 64) for size in shape) for shape in full[:2]]
        return small if self.dry_run else full


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
            ratio = f"{milliseconds / ours:.2f}"
            yield f"| {self.case} | {name} | {milliseconds:.4f} | {self.rate(name)} | {ratio} |"
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
    for i, (name, run) in enumerate(implementations.items()):
        try:
            for _ in range(2):
                run()
            _synchronize(place)
            running[name] = run
        except Exception as error:
            if i == 0:
                raise
            missing[name] = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(2 if place.dry_run else place.rounds):
        for name, run in running.items():
            times[name].append(_once(run, place))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return Timing(case, medians, flops, bytes, missing)


_flush: list[Tensor] = []


def _once(run: Callable[[], object], place: Place) -> float:
    if place.device.type != "cuda":
        start_s = time.perf_counter()
        run()
        return (time.perf_counter() - start_s) * 1e3
    if not _flush:
        _flush.append(torch.empty(2**28, dtype=torch.int8, device=place.device))
    _flush[0].zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _synchronize(place: Place) -> None:
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)
