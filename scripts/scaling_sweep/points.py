"""The runs of a sweep: every number of ranks with natural and with forced routing, repeated."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from configs.loader import flatten, load
from configs.parallel_dims import resolve
from configs.paths import check_folder, local_path
from configs.schema import JobConfig
from launch.run_folder import records
from scripts.scaling_report.steps import LEAST_STEPS, WARMUP

_STEPS = WARMUP + LEAST_STEPS + 1
_OWN = ("--run.dir", "--train.profile_steps", "--model.moe.force_balance", "--checkpoint.dir")
ROUTINGS = {"natural": "false", "forced": "true"}
"""Value of `model.moe.force_balance`."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    folder: Path
    ranks: int
    overrides: tuple[str, ...]
    """All of its settings, as `--section.key=value`."""
    config: JobConfig

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def steps(self) -> int:
        """Steps that it has recorded."""
        return max((int(record["step"]) for record in records(self.folder)), default=0)

    @property
    def is_complete(self) -> bool:
        return self.steps >= self.config.train.steps


def points_of(
    file: str,
    overrides: Sequence[str],
    ranks: Sequence[int],
    repeats: int,
    out: Path | None,
    *,
    is_weak: bool,
) -> list[Point]:
    """All points, repeats slowest: a change of the machine's load affects every point. out: folder
    of the runs; None: `run.dir` of the experiment with `-scaling`. Raises UserError for a mesh that
    does not fit, and for a run in the folder that has other settings."""
    config = load(file, overrides)
    if own := [word for word in overrides if word.split("=")[0] in _OWN]:
        raise UserError(f"{own[0]}: every point has its own; leave it out")
    if config.checkpoint.dir:
        raise UserError("checkpoint.dir: every point has its own; leave it out")
    steps = config.train.steps
    if steps < _STEPS:
        raise UserError(
            f"train.steps = {steps}: a point needs at least {_STEPS}: {WARMUP} of "
            f"warmup, {LEAST_STEPS} that are measured, and the last, which is profiled"
        )
    folder = local_path(out or config.run.dir.rstrip("/") + "-scaling")
    check_folder("--out", str(folder))
    found = []
    for repeat in range(repeats):
        for n in ranks:
            batch = config.train.global_batch * (n if is_weak else 1)
            for routing, forced in ROUTINGS.items():
                place = folder / f"{routing}-{n}-{repeat}"
                words = (
                    *overrides, f"--train.global_batch={batch}", f"--train.profile_steps=[{steps}]",
                    f"--model.moe.force_balance={forced}", f"--run.dir={place}",
                )  # fmt: skip
                own_config = load(file, words)
                resolve(own_config, n)
                found.append(Point(place, n, words, own_config))
    for point in found:
        _check_folder(point)
    return found


def _check_folder(point: Point) -> None:
    """Raise UserError if the folder has a run with other settings: it would count as this point."""
    path = point.folder / "config.toml"
    if not path.is_file():
        return
    wanted, found = flatten(point.config), flatten(load(path))
    for key, value in wanted.items():
        if key not in ("run.dir", "checkpoint.dir") and found[key] != value:
            raise UserError(
                f"{point.folder}: has a run with {key} = {found[key]!r}, and this sweep has "
                f"{value!r}; use another folder (--out), or remove this one"
            )


def outcome(points: Sequence[Point], failed: Sequence[Point]) -> list[str]:
    """What to print at the end about points that failed."""
    if not failed:
        return []
    names = ", ".join(point.name for point in failed)
    done = [point for point in points if point.is_complete]
    return [
        f"error: {len(failed)} of {len(points)} points failed: {names}; no report. The same "
        f"command tries them again; {len(done)} are complete and are not repeated"
    ]
