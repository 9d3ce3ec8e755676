"""Reads runs and refuses those that cannot be compared."""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.loader import flatten, load
from configs.schema import JobConfig
from scripts.scaling_report.steps import LEAST_STEPS, WARMUP
from train.report.metrics import EXPERT_LOAD, METRICS, read_lines

MAY_DIFFER = (
    "run.dir", "run.seed", "parallel.dp_replicate", "parallel.dp_shard", "parallel.tp",
    "parallel.ep", "parallel.etp", "model.moe.force_balance", "data.cache_dir",
    "train.profile_steps",
)  # fmt: skip
"""Settings of the mesh, of the repeat and of the place."""
WEAK_TOO = ("train.global_batch",)
"""Weak scaling: the batch grows with the ranks."""
_FIELDS = ("step_s", "data_share", "memory_gib")
"""What a record of a step must have to be used."""


@dataclass(frozen=True)
class MeasuredRun:
    """One run's figures; all are measured."""

    folder: Path
    ranks: int
    mesh: dict[str, int]
    device: str
    compute_dtype: str
    config: JobConfig
    tokens_per_s: float
    """Tokens of the steps after the warmup over their time."""
    step_s: tuple[float, ...]
    data_share: float
    memory_gib: float
    """Of rank 0: the largest allocation on CUDA, else resident memory."""
    mfu: float | None
    imbalance: float | None
    """Mean over steps and layers of the largest load over the mean load; None without records."""
    attempts: tuple[dict[str, Any], ...]
    """The starts, as environment.json has them."""
    unreadable: int
    """Steps without a usable record, which are left out."""

    @property
    def is_forced(self) -> bool:
        return self.config.model.moe.force_balance


def read_run(folder: Path) -> MeasuredRun:
    """The run in a folder. Raises UserError, one line, if it has no usable figures."""
    records = read_lines(folder / METRICS)
    if not (folder / "config.toml").is_file() or not records:
        raise UserError(f"{folder}: no run with metrics (config.toml and {METRICS} with steps)")
    config = load(folder / "config.toml")
    steps = config.train.steps
    last = max((r["step"] for r in records if r["step"] <= steps), default=0)
    complete = [*{r["step"]: r for r in records if _is_complete(r, steps)}.values()]
    attempts = _attempts(folder)
    profiled = _profiled(folder)
    used = [r for r in complete if r["step"] > WARMUP and r["step"] not in profiled]
    if len(used) < LEAST_STEPS:
        raise UserError(
            f"{folder}: {len(complete)} steps; at least {LEAST_STEPS} are needed after {WARMUP} of "
            "warmup, without those that were profiled"
        )
    tokens = config.train.global_batch * config.data.seq_len
    rows = [row for r in read_lines(folder / EXPERT_LOAD) for row in r["load"]]
    loads = [row for row in rows if sum(row) > 0 <= min(row)]
    return MeasuredRun(
        folder=folder,
        ranks=int(attempts[-1]["ranks"]),
        mesh={axis: int(size) for axis, size in attempts[-1]["mesh"].items()},
        device=f"{attempts[-1]['device']}, torch {attempts[-1]['packages']['torch']}",
        compute_dtype=str(attempts[-1].get("compute_dtype", "")),
        config=config,
        tokens_per_s=tokens * len(used) / sum(r["step_s"] for r in used),
        step_s=tuple(float(r["step_s"]) for r in used),
        data_share=statistics.mean(r["data_share"] for r in used),
        memory_gib=max(r["memory_gib"] for r in used),
        mfu=_mean(r.get("mfu") for r in used),
        imbalance=_mean(max(row) * len(row) / sum(row) for row in loads),
        attempts=tuple(attempts),
        unreadable=last - len(complete),
    )


def _is_complete(record: dict[str, Any], steps: int) -> bool:
    """Whether a step is one of the run's, and its figures are there and possible."""
    step_s, share, memory = values = [record.get(name, math.nan) for name in _FIELDS]
    possible = all(map(math.isfinite, values)) and step_s > 0 <= share <= 1 and memory >= 0
    return bool(0 < record["step"] <= steps and possible)


def _mean(values: Any) -> float | None:
    found = list(values)
    return None if not found or None in found else statistics.fmean(found)


def _profiled(folder: Path) -> set[int]:
    words = [path.name.split("-")[1] for path in (folder / "profile").glob("step-*.json")]
    return {int(word) for word in words if word.isdecimal()}


def _attempts(folder: Path) -> list[dict[str, Any]]:
    path = folder / "environment.json"
    try:
        found = json.loads(path.read_bytes())
        ranks = {int(attempt["ranks"]) for attempt in found}
        for attempt in found:
            {axis: int(size) for axis, size in attempt["mesh"].items()}
            attempt["device"], attempt["packages"]["torch"]
        if not ranks or min(ranks) < 1:
            raise ValueError
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{path}: missing or damaged; the number of ranks is not known") from None
    if len(ranks) != 1:
        raise UserError(f"{path}: the run continued on other numbers of ranks: {sorted(ranks)}")
    if any(attempt["mesh"] != found[0]["mesh"] for attempt in found):
        raise UserError(
            f"{path}: the run continued on another mesh; its steps are not of one point"
        )
    return list(found)


def check_comparable(runs: list[MeasuredRun]) -> str:
    """`strong` if every run has the same global batch, `weak` if it grows with the ranks. Raises
    UserError with the key in which two runs differ."""
    first = runs[0]
    expected = flatten(first.config)
    for run in runs[1:]:
        other = flatten(run.config)
        for key in expected:
            if key not in (*MAY_DIFFER, *WEAK_TOO) and other[key] != expected[key]:
                raise UserError(
                    f"{run.folder}: {key} = {other[key]!r}, but {first.folder} has "
                    f"{expected[key]!r}; runs of a report differ in their mesh only"
                )
        for what, one, two in (
            ("measured on", run.device, first.device),
            ("computed in", run.compute_dtype, first.compute_dtype),
        ):
            if one != two:
                raise UserError(f"{run.folder}: {what} {one}, but {first.folder} {what} {two}")
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise UserError("a run is given twice")
    per_rank = {run.config.train.global_batch / run.ranks for run in runs}
    batches = {run.config.train.global_batch for run in runs}
    if len(batches) == 1:
        return "strong"
    if len(per_rank) == 1:
        return "weak"
    raise UserError(
        f"train.global_batch = {sorted(batches)}: neither the same in all runs (strong scaling) "
        "nor proportional to the ranks (weak scaling)"
    )
