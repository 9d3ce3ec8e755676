"""Requests to a rank: small files in `RUN/faults`, which the rank reads before every step."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.rules import shown
from train.atomic_files import replace_text

KINDS = ("nan", "nan_gradient", "skip", "slow", "disk_full", "spike", "flip_weight")
FOLDER, READY = "faults", "ready"


@dataclass(frozen=True)
class Request:
    """A fault that a rank injects into itself."""

    kind: str
    amount: float = 0.0
    """slow: percent of a step. disk_full: steps. spike: factor of the weights."""


def folder_of(run: Path) -> Path:
    """The folder of requests of a run."""
    return run / FOLDER


def send(run: Path, rank: int, request: Request) -> None:
    """Ask a rank for a fault at its next step."""
    replace_text(folder_of(run) / f"rank-{rank:05}.json", json.dumps(asdict(request)))


def receive(run: Path, rank: int) -> Request | None:
    """The request for this rank, which is then removed."""
    path = folder_of(run) / f"rank-{rank:05}.json"
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    path.unlink()
    try:
        found = Request(**json.loads(raw))
    except (ValueError, TypeError):
        return None
    return found if found.kind in KINDS else None


def describe(request: Request) -> str:
    """Words for the log."""
    return f"{request.kind} {shown(request.amount)}" if request.amount else request.kind
