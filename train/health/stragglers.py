"""Names a rank that is slower than the others, from every rank's own time of a step.

All ranks take the same time for a step, because they wait for the slowest: so waiting is subtracted
(`parallel.waiting`). A rank's excess in a step is its own time over the median of the other ranks'.
It is named if the median excess of 15 steps is above the limit and beyond three standard errors,
and that of every 5 steps above half the limit.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

EVERY = 5
"""Steps between exchanges of the times."""
WINDOW = 15
_QUIET = 100
"""Steps before a rank is named again."""
_MARGIN = 2.0
"""Percent by which the excess must be beyond three standard errors."""
RANK_TIMES = "rank_times.jsonl"


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of one rank."""

    own: float
    """Computing: the step without `wait` and `data`."""
    wait: float
    """In collectives."""
    data: float
    """Until the microbatches were there."""


class Stragglers:
    """The own times of all ranks over the last steps; used on one rank."""

    def __init__(self, percent: float) -> None:
        """percent: excess from which a rank is named; 0: never."""
        self.percent = percent
        self._steps: deque[Sequence[float]] = deque(maxlen=WINDOW)
        self._named: dict[int, int] = {}

    def add(self, step: int, times: Sequence[Sequence[StepTime]]) -> list[str]:
        """Add the times of the last steps, `[ranks][steps]`; returns a line for each slow rank."""
        for one in zip(*times, strict=True):
            # reading data late delays a step like computing slowly
            self._steps.append([time.own + time.data for time in one])
        if not self.percent or len(self._steps) < WINDOW or len(times) < 2:
            return []
        lines = []
        for rank, latest in enumerate(times):
            excess = [_excess(one, rank) for one in self._steps]
            middle = statistics.median(excess)
            spread = 1.4826 * statistics.median(abs(e - middle) for e in excess)
            error = 1.2533 * spread / math.sqrt(len(excess))
            parts = [excess[i : i + EVERY] for i in range(0, WINDOW, EVERY)]
            steady = min(statistics.median(part) for part in parts) > self.percent / 2
            if middle <= self.percent or middle - 3 * error <= _MARGIN or not steady:
                continue
            if step - self._named.get(rank, -_QUIET) < _QUIET:
                continue
            self._named[rank] = step
            own, wait, data = (
                statistics.median(getattr(time, name) for time in latest)
                for name in ("own", "wait", "data")
            )
            lines.append(
                f"step {step}: rank {rank} is slow: {middle:.0f} percent more time than the other "
                f"ranks over {len(excess)} steps (per step {own:.3f} s of its own, {wait:.3f} s "
                f"waiting, {data:.3f} s for data)"
            )
        return lines


def _excess(times: Sequence[float], rank: int) -> float:
    """Percent by which a rank's time is more than the median of the others'."""
    others = statistics.median([*times[:rank], *times[rank + 1 :]])
    return 100 * (times[rank] / others - 1) if others > 0 else 0.0


def record(folder: Path, step: int, times: Sequence[Sequence[StepTime]]) -> None:
    """Append the medians of all ranks to `rank_times.jsonl`."""
    medians = {
        name: [round(statistics.median(getattr(t, name) for t in rank), 6) for rank in times]
        for name in ("own", "wait", "data")
    }
    with (folder / RANK_TIMES).open("a") as file:
        file.write(json.dumps({"step": step, **medians}) + "\n")
