"""The records in a folder of a run: submissions, progress, failed nodes."""

import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.loader import load
from configs.paths import is_url, local_path
from configs.rules import shown

LAUNCH, SUBMISSION, SCRIPT = "launch", "submission.json", "train.sbatch"
SERVE_SCRIPT, ADDRESS = "serve.sbatch", "address"
_RECENT = 20
"""Last steps that speed and remaining time are computed from."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """The last submission of a run: enough to repeat it."""

    arguments: list[str]
    """Words of the command line after `python -m launch.slurm`."""
    folder: str
    """Working directory of that command."""
    jobs: list[str]
    """Ids of all jobs submitted so far, oldest first."""


def launch_folder(run: Path) -> Path:
    """The folder of scripts and logs of a run. Raises UserError if nothing was submitted."""
    folder = run / LAUNCH
    if not (folder / SUBMISSION).is_file():
        raise UserError(
            f"{run}: no run that python -m launch.slurm submitted (no {LAUNCH}/{SUBMISSION})"
        )
    return folder


def read_submission(run: Path) -> Submission:
    """The last submission. Raises UserError, one line, if it is missing or damaged."""
    path = launch_folder(run) / SUBMISSION
    try:
        found = Submission(**json.loads(path.read_bytes()))
        texts = [*found.arguments, found.folder, *found.jobs]
        is_text = found.jobs and all(isinstance(text, str) for text in texts)
        if is_text and all(map(_is_job, found.jobs)):
            return found
    except (ValueError, TypeError, RecursionError):
        pass
    raise UserError(f"{path}: damaged; submit the run again")


def _is_job(job: str) -> bool:
    return job.isascii() and job.isdigit()


def write_submission(run: Path, submission: Submission) -> None:
    """Replace the record."""
    replace(run / LAUNCH / SUBMISSION, json.dumps(asdict(submission), indent=2) + "\n")


def replace(path: Path, text: str) -> None:
    """Write a file so that readers find the old or the new text, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def failed_nodes(run: Path, at_least: int) -> tuple[str, ...]:
    """Nodes on which at least so many failures of this run began."""
    path = run / LAUNCH / "failed_nodes"
    lines = path.read_text().split() if path.is_file() else []
    return tuple(sorted(node for node, times in Counter(lines).items() if times >= at_least))


def records(run: Path) -> list[dict[str, float]]:
    """The steps in metrics.jsonl: their numbers, without damaged or incomplete lines."""
    path, found = run / "metrics.jsonl", []
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        numbers = _numbers(record) if isinstance(record, dict) else {}
        if numbers.get("step", 0) > 0 and isinstance(record["step"], int) and "loss" in numbers:
            found.append(numbers)
    return found


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {
        key: value
        for key, value in record.items()
        if type(value) is float or (type(value) is int and abs(value) < 2**63)
    }


def finite(steps: Sequence[dict[str, float]], key: str) -> list[float]:
    """The values of a field, without steps that have none."""
    return [step[key] for step in steps if math.isfinite(step.get(key, math.nan))]


def status(run: Path) -> dict[str, str]:
    """Step, loss, speed, remaining time, starts and last checkpoint, from the run's own files."""
    if not run.is_dir():
        raise UserError(f"{shown(str(run))}: no such run folder")
    steps, lines = records(run), dict[str, str]()
    config = load(run / "config.toml") if (run / "config.toml").is_file() else None
    if steps:
        last, recent = steps[-1], steps[-_RECENT:]
        total = config.train.steps if config else 0
        lines["step"] = f"{last['step']}" + (f" of {total}" if total else "")
        lines["loss"] = f"{last['loss']:.4f}"
        if "validation_loss" in last:
            lines["validation loss"] = f"{last['validation_loss']:.4f}"
        if speeds := finite(recent, "tokens_per_s"):
            lines["tokens/s"] = f"{statistics.median(speeds):,.0f}"
        times = finite(recent, "step_s")
        if times and total > last["step"]:
            lines["eta"] = _duration((total - last["step"]) * statistics.median(times))
            lines["eta"] += " of steps"
    else:
        lines["step"] = "none yet"
    lines["starts"] = str(_starts(run))
    lines["checkpoint"] = _newest(run, config.checkpoint.dir if config else "")
    return lines


def _newest(run: Path, setting: str) -> str:
    """The newest checkpoint. setting: `checkpoint.dir`."""
    if is_url(setting):
        return f"in {setting}"
    saved = sorted((local_path(setting) if setting else run / "checkpoints").glob("step-*"))
    return saved[-1].name if saved else "none yet"


def _starts(run: Path) -> int:
    path = run / "environment.json"
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else []
    except (ValueError, RecursionError):
        return 0
    return len(found) if isinstance(found, list) else 0


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def node_logs(run: Path) -> list[Path]:
    """All logs, oldest first."""
    return sorted(launch_folder(run).rglob("*.log"), key=lambda path: path.stat().st_mtime)


def tail(path: Path, lines: int) -> Sequence[str]:
    """The last lines of a text file; reads at most its last MiB."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**20))
        return file.read().decode(errors="replace").splitlines()[-lines:]
