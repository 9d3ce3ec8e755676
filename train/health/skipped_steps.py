"""Steps whose update was left out because a number was not finite, and their limit.

They are recorded in `skipped_steps.jsonl` of the run, so that a resumed run counts as an
uninterrupted one does; entries after the checkpoint that a run resumes from are removed.
"""

import json
import os
from pathlib import Path

from configs.health.settings import HealthConfig
from train.atomic_files import naming, replace_text
from train.step import NonFiniteError

SKIPPED = "skipped_steps.jsonl"


class SkippedSteps:
    """The skipped steps of a run; the same on all ranks."""

    def __init__(self, limits: HealthConfig, steps: list[int], writes_to: Path | None) -> None:
        """steps: skipped so far, ascending (`read`). writes_to: folder of the run; None on ranks
        that do not write."""
        self.limits, self.steps, self.folder = limits, steps, writes_to

    def add(self, step: int, error: NonFiniteError) -> None:
        """Record a skipped step. Raises the error if it must not be skipped, or one too many."""
        window = [s for s in self.steps if s > step - self.limits.skip_window]
        if not error.can_skip or len(window) >= self.limits.max_skipped_steps:
            if window and error.can_skip:
                shown = ", ".join(map(str, window[-5:]))
                error.args = (f"{error}; steps {shown} were skipped before",)
            raise error
        self.steps.append(step)
        if self.folder is not None:
            path = self.folder / SKIPPED
            with naming(path), path.open("a") as file:
                file.write(json.dumps({"step": step, "reason": str(error)}) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def ends_with(self, step: int) -> bool:
        """Whether this step was skipped."""
        return bool(self.steps) and self.steps[-1] == step


def read(folder: Path, last_step: int) -> list[int]:
    """The skipped steps up to `last_step`; removes the others from the file."""
    path = folder / SKIPPED
    if not path.is_file():
        return []
    kept: dict[int, str] = {}
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            if record["step"] <= last_step:
                kept[record["step"]] = json.dumps(record) + "\n"
    replace_text(path, "".join(kept[step] for step in sorted(kept)))
    return sorted(kept)
