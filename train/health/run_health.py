"""The checks of a running training, in one object: skipped steps, loss spikes, slow ranks,
differing replicas. Every decision is the same on all ranks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.errors import UserError
from configs.schema import JobConfig
from parallel.ranks import Ranks, gather_json
from train.health import skipped_steps, spikes, stragglers
from train.health.replicas import differing_replicas
from train.health.skipped_steps import SkippedSteps
from train.health.spikes import LeftOutData, LossSpike, LossWatch
from train.health.stragglers import StepTime, Stragglers
from train.report.metrics import METRICS, read_lines


class DifferingReplicas(RuntimeError):
    """Ranks that should hold the same values do not; raised on all ranks together."""


class RunHealth:
    """The state of the checks; `resume` reads it from the records of the run."""

    def __init__(self, config: JobConfig, ranks: Ranks, folder: Path) -> None:
        self.limits, self.ranks, self.folder = config.health, ranks, folder
        self._slow = Stragglers(self.limits.straggler_percent)
        self._times: list[StepTime] = []
        intervals, self.rollbacks = ranks.on_first(self._read_left_out)
        self.left_out = LeftOutData(intervals, config.data.skipped)

    def resume(self, done: int) -> None:
        """Read the records of the run up to step `done`. All ranks call it together."""
        found: dict[str, Any] = self.ranks.on_first(lambda: self._read(done))
        writes_to = self.folder if self.ranks.is_first else None
        self.skipped = SkippedSteps(self.limits, found["skipped"], writes_to)
        self.losses = LossWatch(self.limits, found["losses"])

    def roll_back(self, spike: LossSpike, step: int, saved: int) -> str:
        """Leave out the data of the steps after the checkpoint of step `saved` up to the spike;
        returns a line for the user. Raises the spike if the run may not return to a checkpoint."""
        if not saved or self.rollbacks >= self.limits.max_rollbacks:
            why = "there is no checkpoint to return to" if not saved else (
                f"the run has returned to a checkpoint {self.rollbacks} times already"
            )  # fmt: skip
            raise LossSpike(f"{spike}; {why}") from None
        self.rollbacks += 1
        self.left_out.add(saved + 1, step)
        self.ranks.on_first(lambda: self.left_out.write(self.folder, self.rollbacks))
        return (
            f"{spike}; returning to the checkpoint of step {saved} without the data of "
            f"{step - saved} steps"
        )

    def time(self, step: int, time: StepTime) -> list[str]:
        """Add this rank's time of a step; returns lines about slow ranks, on rank 0."""
        self._times.append(time)
        if step % stragglers.EVERY or self.ranks.world == 1:
            return []
        own = [[t.own, t.wait, t.data] for t in self._times]
        self._times = []
        times = [[StepTime(*values) for values in rank] for rank in gather_json(own)]
        if not self.ranks.is_first:
            return []
        stragglers.record(self.folder, step, times)
        return self._slow.add(step, times)

    def check_replicas(self, step: int, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Raise DifferingReplicas if ranks that should hold the same values do not."""
        if self.limits.replica_check_every and (found := differing_replicas(tensors())):
            raise DifferingReplicas(
                f"step {step}: {found}: an error of memory or arithmetic; not saved, the newest "
                "checkpoint is sound"
            )

    def _read_left_out(self) -> tuple[list[list[int]], int]:
        try:
            return spikes.read(self.folder)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{self.folder / spikes.LEFT_OUT}: damaged: {error}; restore it, or remove it to "
                "read all data from now on"
            ) from None

    def _read(self, done: int) -> dict[str, Any]:
        records = read_lines(self.folder / METRICS)
        losses = [record["loss"] for record in records if record["step"] <= done]
        return {
            "skipped": skipped_steps.read(self.folder, done),
            "losses": losses[-self.limits.spike_window :],
        }
