"""Where the elapsed time of a run is, over all its starts: the times of its TensorBoard events.

Every step writes an event when it ends, also one that a later start repeats. A step that a killed
process did not write any more counts as time between two starts.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from configs.errors import UserError

_STEP, _CHECKPOINT = "step_s", "checkpoint/blocked_s"


@dataclass(frozen=True)
class StepEvent:
    """The end of one step."""

    step: int
    end: float
    """Unix time."""
    seconds: float
    """Duration of the step, without validation and checkpoint."""
    saving: float = 0.0
    """Seconds before it in which the training waited for checkpoints."""


def elapsed(starts: Sequence[float], attempts: Sequence[Sequence[StepEvent]]) -> dict[str, float]:
    """Shares of the time from the first start to the end of the last step.

    starts: Unix time of each start. attempts: the steps of each start, in order. `goodput`: steps
    that were kept, each counted once. `repeated`: steps that a later start computed again.
    `checkpoints`: time between steps in which the training waited for them, `between steps` the
    other (validation, output). `start-up`: from a start to its first step.
    `down`: from the last step of a start to the next start.
    """
    attempts = [list(steps) for steps in attempts]
    while not attempts[-1]:  # a start of a complete run
        attempts.pop()
    last = max(steps[-1].end for steps in attempts if steps)
    total = last - starts[0]
    names = ("goodput", "repeated", "checkpoints", "between steps", "start-up", "down")
    parts = dict.fromkeys(names, 0.0)
    # a step is kept if no later one has its number or a smaller one
    kept, least = set[int](), math.inf
    for event in reversed([step for steps in attempts for step in steps]):
        if event.step < least:
            kept.add(id(event))
        least = min(least, event.step)
    for i, steps in enumerate(attempts):
        time = starts[i]
        for j, step in enumerate(steps):
            before = max(step.end - step.seconds - time, 0.0)
            saving = min(step.saving, before) if j else 0.0
            parts["checkpoints"] += saving
            parts["between steps" if j else "start-up"] += before - saving
            parts["goodput" if id(step) in kept else "repeated"] += step.seconds
            time = step.end
        if i + 1 < len(attempts):
            parts["down"] += max(starts[i + 1] - time, 0.0)
    return {name: seconds / total for name, seconds in parts.items()}


def read_goodput(folder: Path, attempts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """`elapsed` of the run in a folder; empty if it has no events. attempts: of its
    environment.json. Raises UserError for files that cannot be read."""
    files = sorted((folder / "tensorboard").glob("events.out.tfevents.*"))
    if not files:
        return {}
    try:
        starts = [datetime.fromisoformat(str(one["time"])).timestamp() for one in attempts]
        by_start: list[list[StepEvent]] = [[] for _ in starts]
        for event in sorted((e for file in files for e in _events(file)), key=lambda e: e.end):
            begun = [i for i, start in enumerate(starts) if start <= event.end]
            by_start[begun[-1] if begun else 0].append(event)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: times of its steps cannot be read: {error}") from None
    return elapsed(starts, by_start) if any(by_start) else {}


def _events(file: Path) -> list[StepEvent]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    found = []
    events = EventFileLoader(str(file)).Load()
    for step, of_step in itertools.groupby(events, key=lambda event: event.step):
        values = {
            value.tag: (event.wall_time, float(make_ndarray(value.tensor)))
            for event in of_step
            for value in event.summary.value
            if value.tag in (_STEP, _CHECKPOINT)
        }
        if _STEP in values:
            end, seconds = values[_STEP]
            saving = values[_CHECKPOINT][1] if _CHECKPOINT in values else 0.0
            found.append(StepEvent(step, end, seconds, saving))
    return found
