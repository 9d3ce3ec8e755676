"""Names a rank that is slower than the others, from every rank's own time of a step.

All ranks take the same time for a step, because they wait for the slowest: so waiting is subtracted
(`parallel.waiting`). A rank's excess in a step is its own time over the median of the other ranks'.
It is named if the median excess of 15 steps is above the limit and beyond four standard errors, and
that of every 5 steps above half the limit.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

EVERY = 5
"""Steps between exchanges of the times."""
WINDOW = 15
_QUIET = 100
"""Steps before a rank is named again."""
_HISTORY = 100
"""Steps from which the scatter is estimated."""
_ERRORS = 4.0
_FEW = 16
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
        self._steps: deque[list[float]] = deque(maxlen=_HISTORY)
        self._named: dict[int, int] = {}

    def add(self, step: int, times: Sequence[Sequence[StepTime]]) -> list[str]:
        """Add the times of the last steps, `[ranks][steps]`; returns a line for each slow rank."""
        for one in zip(*times, strict=True):
            # reading data late delays a step like computing slowly
            self._steps.append([time.own + time.data for time in one])
        if not self.percent or len(self._steps) < WINDOW or len(times) < 2:
            return []
        excess = _excess(np.array(self._steps))
        # between neighboring steps, so that a rank that has become slow does not add to the scatter
        scatter = 1.4826 * np.median(np.abs(np.diff(excess, axis=0)), axis=0) / math.sqrt(2)
        errors = 1.2533 * scatter / math.sqrt(WINDOW)
        parts = excess[-WINDOW:].reshape(-1, EVERY, len(times))
        middle, least = np.median(excess[-WINDOW:], axis=0), np.median(parts, axis=1).min(axis=0)
        # with more ranks, one is further off by chance
        beyond = math.sqrt(_ERRORS**2 + 2 * math.log(len(times)))
        slow = (middle > self.percent) & (middle > beyond * errors) & (least > self.percent / 2)
        return [
            self._line(step, rank, float(middle[rank]), times[rank])
            for rank in np.flatnonzero(slow).tolist()
            if self._is_news(step, rank)
        ]

    def _is_news(self, step: int, rank: int) -> bool:
        if step - self._named.get(rank, -_QUIET) < _QUIET:
            return False
        self._named[rank] = step
        return True

    def _line(self, step: int, rank: int, excess: float, latest: Sequence[StepTime]) -> str:
        own, wait, data = (
            statistics.median(getattr(time, name) for time in latest)
            for name in ("own", "wait", "data")
        )
        return (
            f"step {step}: rank {rank} is slow: {excess:.0f} percent more time than the other "
            f"ranks over {WINDOW} steps (per step {own:.3f} s of its own, {wait:.3f} s waiting, "
            f"{data:.3f} s for data)"
        )


def _excess(times: np.ndarray) -> np.ndarray:
    """Percent by which a rank's time is more than the median of the others', `[steps, ranks]`."""
    ranks = times.shape[1]
    if ranks <= _FEW:
        others = np.stack(
            [np.median(np.delete(times, rank, axis=1), axis=1) for rank in range(ranks)], axis=1
        )
    else:  # one rank hardly changes the median of all
        others = np.median(times, axis=1, keepdims=True)
    return 100 * (times / np.maximum(others, 1e-9) - 1)


def record(folder: Path, step: int, times: Sequence[Sequence[StepTime]]) -> None:
    """Append the medians of all ranks to `rank_times.jsonl`; they are lost if the disk is full."""
    medians = {
        name: [round(statistics.median(getattr(t, name) for t in rank), 6) for rank in times]
        for name in ("own", "wait", "data")
    }
    with suppress(OSError), (folder / RANK_TIMES).open("a") as file:
        file.write(json.dumps({"step": step, **medians}) + "\n")
