"""Variants of one experiment: every combination of values, and a table of their results."""

import itertools
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from configs.rules import shown
from configs.schema import JobConfig
from launch import run_folder

_KEY = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+")
_UNSAFE = re.compile(r"[^A-Za-z0-9_.+=-]")
_MOST_RUNS = 1000
RESULTS = "results.md"


@dataclass(frozen=True)
class Variant:
    """One point of a sweep."""

    name: str
    """Name of its folder, unique in the sweep."""
    nodes: int
    overrides: tuple[str, ...]


def variants(
    settings: Sequence[str], nodes: Sequence[int], overrides: Sequence[str] = ()
) -> list[Variant]:
    """All combinations, node counts slowest. settings: `section.key=a,b,...` (commas inside
    brackets or quotes belong to a value). overrides: of all runs. Raises UserError, one line."""
    axes: list[list[tuple[str, str]]] = []
    for setting in settings:
        key, found, values = setting.partition("=")
        if not found or not _KEY.fullmatch(key):
            raise UserError(f"--set {shown(setting)}: must be section.key=value,value,...")
        if key in ("run.dir", "checkpoint.dir", "train.profile_steps"):
            raise UserError(f"--set {key}: every run of a sweep has its own")
        parts = _split(values)
        if not all(parts) or len({*parts}) < len(parts):
            raise UserError(f"--set {shown(setting)}: a value is empty or given twice")
        axes.append([(key, value) for value in parts])
    varied = {f"--{axis[0][0]}" for axis in axes}
    if twice := [word for word in overrides if word.partition("=")[0] in varied]:
        raise UserError(f"{twice[0]}: --set has other values of this key; leave one of them out")
    if len({axis[0][0] for axis in axes}) < len(axes):
        raise UserError("--set: a key is given twice")
    if len({*nodes}) < len(nodes) or min(nodes) < 1:
        raise UserError(f"counts {list(nodes)}: must be positive and different")
    found_all: list[Variant] = []
    points = [(count, chosen) for count in nodes for chosen in itertools.product(*axes)]
    for count, chosen in points:
        words = [f"{key.split('.')[-1]}={_UNSAFE.sub('_', value)}" for key, value in chosen]
        name = "-".join([*words, *[f"n{count}"] * (len(nodes) > 1)]) or "only"
        found_all.append(Variant(name, count, tuple(f"--{key}={value}" for key, value in chosen)))
    if len(found_all) > _MOST_RUNS:
        raise UserError(f"{len(found_all)} runs: a sweep has at most {_MOST_RUNS}")
    names = [variant.name for variant in found_all]
    if len({*names}) < len(names):  # values that differ in characters of no file name
        found_all = [
            Variant(f"{i}-{v.name}", v.nodes, v.overrides) for i, v in enumerate(found_all)
        ]
    return found_all


def own_checkpoints(config: JobConfig, name: str) -> list[str]:
    """The override that gives a variant its own folder of checkpoints in `checkpoint.dir`."""
    folder = config.checkpoint.dir.rstrip("/")
    return [f"--checkpoint.dir={folder}/{name}"] if folder else []


def _split(values: str) -> list[str]:
    """Split at commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in values:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        depth += (character in "[{") - (character in "]}") if not quote else 0
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _runs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "launch")


def has_runs(folder: Path) -> bool:
    """Whether a run of a sweep has started."""
    return bool(_runs(folder))


def results(folder: Path) -> str:
    """The table of all runs in a folder as Markdown, and write it there. Raises UserError."""
    runs = _runs(folder)
    if not runs:
        raise UserError(f"{folder}: no runs in it")
    lines = ["| run | steps | loss | validation loss | tokens/s | memory, GiB |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for run in runs:
        steps = run_folder.records(run)
        if not steps:
            lines.append(f"| {run.name} | none | | | | |")
            continue
        last = steps[-1]
        # the first step of a process also compiles and allocates
        speeds = run_folder.finite(steps[1:] or steps, "tokens_per_s")
        memory = run_folder.finite(steps, "memory_gib")
        validation = [f"{last['validation_loss']:.4f}"] if "validation_loss" in last else []
        row = [
            run.name, str(last["step"]), f"{last['loss']:.4f}", *(validation or [""]),
            f"{statistics.median(speeds):,.0f}" if speeds else "",
            f"{max(memory):.2f}" if memory else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(row) + " |")
    text = "\n".join(lines) + "\n"
    run_folder.replace(folder / RESULTS, text)
    return text
