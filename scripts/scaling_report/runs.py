"""Reads runs and refuses those that cannot be compared."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.loader import flatten, load
from configs.schema import JobConfig
from train.report.metrics import EXPERT_LOAD, METRICS, read_lines

MAY_DIFFER = (
    "run.dir", "run.seed", "parallel.dp_replicate", "parallel.dp_shard", "parallel.tp",
    "parallel.ep", "parallel.etp", "model.moe.force_balance", "data.cache_dir",
    "train.profile_steps",
)  # fmt: skip
"""Settings of the mesh, of the repeat and of the place."""
WEAK_TOO = ("train.global_batch",)
"""Weak scaling: the batch grows with the ranks."""
WARMUP = 2
"""First steps of a start, which are left out: they allocate and compile."""


@dataclass(frozen=True)
class MeasuredRun:
    """One run's figures; all are measured."""

    folder: Path
    ranks: int
    mesh: dict[str, int]
    device: str
    config: JobConfig
    tokens_per_s: float
    """Tokens of the steps after the warmup over their time."""
    step_s: tuple[float, ...]
    data_share: float
    memory_gib: float
    """Of rank 0: the largest allocation on CUDA, else resident memory."""
    mfu: float | None
    imbalance: float
    """Mean over steps and layers of the largest load over the mean load."""
    starts: int

    @property
    def is_forced(self) -> bool:
        return self.config.model.moe.force_balance

    @property
    def repeat(self) -> str:
        return self.folder.name


def read_run(folder: Path) -> MeasuredRun:
    """The run in a folder. Raises UserError, one line, if it has no usable figures."""
    records = read_lines(folder / METRICS)
    if not (folder / "config.toml").is_file() or not records:
        raise UserError(f"{folder}: no run with metrics (config.toml and {METRICS} with steps)")
    used = [r for r in records if r["step"] > WARMUP and "step_s" in r]
    used = [r for r in used if r["step"] not in _profiled(folder)]
    if len(used) < 3:
        raise UserError(
            f"{folder}: {len(records)} steps; at least 3 are needed after {WARMUP} of warmup, "
            "without those that were profiled"
        )
    attempts = _attempts(folder)
    config = load(folder / "config.toml")
    tokens = config.train.global_batch * config.data.seq_len
    loads = [row for r in read_lines(folder / EXPERT_LOAD) for row in r["load"] if any(row)]
    return MeasuredRun(
        folder=folder,
        ranks=int(attempts[-1]["ranks"]),
        mesh={axis: int(size) for axis, size in attempts[-1]["mesh"].items()},
        device=f"{attempts[-1]['device']}, torch {attempts[-1]['packages']['torch']}",
        config=config,
        tokens_per_s=tokens * len(used) / sum(r["step_s"] for r in used),
        step_s=tuple(float(r["step_s"]) for r in used),
        data_share=statistics.mean(r["data_share"] for r in used),
        memory_gib=max(r["memory_gib"] for r in used),
        mfu=statistics.mean(r["mfu"] for r in used) if "mfu" in used[0] else None,
        imbalance=statistics.mean(max(row) * len(row) / sum(row) for row in loads) if loads else 1,
        starts=len(attempts),
    )


def _profiled(folder: Path) -> set[int]:
    return {int(path.name.split("-")[1]) for path in (folder / "profile").glob("step-*.json")}


def _attempts(folder: Path) -> list[dict[str, Any]]:
    path = folder / "environment.json"
    try:
        found = json.loads(path.read_bytes())
        ranks = {int(attempt["ranks"]) for attempt in found}
        {attempt["mesh"].items and attempt["device"] and attempt["packages"]["torch"]
         for attempt in found}  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{path}: missing or damaged; the number of ranks is not known") from None
    if len(ranks) != 1:
        raise UserError(f"{path}: the run continued on other numbers of ranks: {sorted(ranks)}")
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
        if run.device != first.device:
            raise UserError(
                f"{run.folder}: measured on {run.device}, but {first.folder} on {first.device}"
            )
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
