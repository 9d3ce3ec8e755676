"""Notices a loss that is far above the recent ones, and which data a run leaves out after it.

A run that returns to a checkpoint because of a spike leaves out the data of the steps since then.
The intervals are recorded in `left_out_data.json` of the run: data step s of the original order is
read by the step that remains after removing them, so a resumed run reads what an uninterrupted one
does.
"""

import json
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from configs.health.settings import HealthConfig
from train.atomic_files import replace_text
from train.dataset.order import data_step

LEFT_OUT = "left_out_data.json"


class LossSpike(RuntimeError):
    """The loss of a step is a spike; raised on all ranks together, after the update."""


class LossWatch:
    """The recent losses; the same on all ranks."""

    def __init__(self, limits: HealthConfig, losses: Iterable[float]) -> None:
        """losses: of the last steps before (from the records of the run)."""
        self.limits = limits
        self._losses = deque(losses, maxlen=limits.spike_window)

    def add(self, step: int, loss: float) -> None:
        """Add the loss of a step. Raises LossSpike; a spike is not added."""
        factor, known = self.limits.spike_factor, self._losses
        if factor and len(known) == self.limits.spike_window:
            middle = statistics.median(known)
            # a loss that hardly changes is no reason to call a small rise a spike
            spread = max(1.4826 * statistics.median(abs(x - middle) for x in known), 1e-3 * middle)
            if loss > middle + factor * spread:
                raise LossSpike(
                    f"step {step}: the loss {loss:.4f} is a spike: the median of the last "
                    f"{len(known)} is {middle:.4f}, their spread {spread:.4f}"
                )
        known.append(loss)


class LeftOutData:
    """Intervals of data steps that the run does not read, both ends included."""

    def __init__(
        self, intervals: Iterable[Iterable[int]], settings: Sequence[tuple[int, int]] = ()
    ) -> None:
        """intervals: left out after spikes. settings: those of `data.skip_steps`."""
        self.intervals = [(first, last) for first, last in intervals]
        self._settings = settings

    @property
    def skipped(self) -> list[tuple[int, int]]:
        """All intervals, in order."""
        return _merged([*self.intervals, *self._settings])

    def data_step(self, step: int) -> int:
        """The data step that step `step` of the run reads."""
        return data_step(step, self.skipped)

    def add(self, first_step: int, last_step: int) -> None:
        """Leave out the data that the run's steps `first_step` to `last_step` read."""
        read = [self.data_step(step) for step in range(first_step, last_step + 1)]
        self.intervals = _merged([*self.intervals, *((step, step) for step in read)])

    def write(self, folder: Path, rollbacks: int) -> None:
        """Record the intervals and the number of returns."""
        content = {"rollbacks": rollbacks, "intervals": self.intervals}
        replace_text(folder / LEFT_OUT, json.dumps(content) + "\n")


def _merged(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same steps in as few intervals as possible, in order."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(intervals):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(merged[-1][1], last)
        else:
            merged.append((first, last))
    return merged


def read(folder: Path) -> tuple[list[list[int]], int]:
    """The recorded intervals and the number of returns so far. Raises ValueError for a damaged
    file: without it the run would read other data."""
    path = folder / LEFT_OUT
    if not path.is_file():
        return [], 0
    content = json.loads(path.read_bytes())
    intervals, rollbacks = content["intervals"], content["rollbacks"]
    pairs = all(len(pair) == 2 and 0 < pair[0] <= pair[1] for pair in intervals)
    if not pairs or type(rollbacks) is not int:
        raise ValueError("not two numbers per interval")
    return intervals, rollbacks
