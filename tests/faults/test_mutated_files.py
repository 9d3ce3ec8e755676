"""2,000 mutated experiments and 2,000 mutated settings of checkpoints: each is accepted, or refused
in one line that names its place; no traceback."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.loader import flatten, load
from tests.runs import ROOT, TINY
from train.checkpoint import config_changes
from train.checkpoint.checkpoint import CheckpointError
from train.checkpoint.manifest import Manifest

FILES = sorted((ROOT / "configs").rglob("*.toml"))
VALUES: list[Any] = [
    "", "x", "none", "9" * 400, -1, 0, 1, 2**31, 2**63, -(2**63), 1e308, -1e308, float("nan"),
    float("inf"), 0.5, True, False, None, [], [1], ["a"], {}, {"a": 1}, [[1]],
    "\u2028", "a\nb", "~",
]  # fmt: skip


def mutated(text: str, source: random.Random) -> bytes:
    """A file with a few random edits of its bytes or lines."""
    raw = bytearray(text.encode())
    for _ in range(source.randrange(1, 5)):
        place = source.randrange(len(raw))
        match source.randrange(7):
            case 0:
                raw[place] ^= 1 << source.randrange(8)
            case 1:
                del raw[place : place + source.randrange(1, 30)]
            case 2:
                raw[place:place] = bytes(source.choices(b"=[]{}\"'.,-#\n0123456789abc_", k=3))
            case 3:
                end = place + source.randrange(1, 60)
                raw[place:place] = raw[place:end]
            case 4:
                lines = bytes(raw).splitlines(keepends=True)
                source.shuffle(lines)
                raw = bytearray(b"".join(lines))
            case 5:
                raw[place:] = b""
            case 6:
                lines = bytes(raw).splitlines(keepends=True)
                lines.insert(place % (len(lines) + 1), lines[source.randrange(len(lines))])
                raw = bytearray(b"".join(lines))
        if not raw:
            raw = bytearray(b"\n")
    return bytes(raw)


def check_line(line: str) -> None:
    assert len(line.splitlines()) == 1 and 10 < len(line) <= 1000, line


def refused(path: Path, count: int, seed: int) -> int:
    """Load so many mutated files; returns how many were refused."""
    source, number = random.Random(seed), 0
    for _ in range(count):
        path.write_bytes(mutated(source.choice(FILES).read_text(), source))
        try:
            load(path)
        except UserError as error:
            number += 1
            line = str(error)
            check_line(line)
            assert str(path) in line or any(
                key in line for key in ("run", "model", "train", "optimizer", "data", "parallel")
            ), line
    return number


def test_mutated_experiments(tmp_path: Path) -> None:
    assert refused(tmp_path / "mine.toml", 120, 0) > 60


@pytest.mark.slow
def test_2000_mutated_experiments(tmp_path: Path) -> None:
    number = refused(tmp_path / "mine.toml", 2000, 1)
    print(f"2,000 mutated experiments: {number} refused, each in one line; no traceback")
    assert number > 1000


def checkpoint_settings(folder: Path, count: int, seed: int) -> int:
    """Read so many mutated settings of a checkpoint; returns how many were refused."""
    source, number = random.Random(seed), 0
    whole = flatten(load(TINY))
    live = load(TINY)
    for _ in range(count):
        config: dict[str, Any] = dict(whole)
        for _ in range(source.randrange(1, 4)):
            key = source.choice(sorted(config))
            match source.randrange(4):
                case 0:
                    config[key] = source.choice(VALUES)
                case 1:
                    del config[key]
                case 2:
                    config[key + source.choice([".x", "x", "."])] = source.choice(VALUES)
                case 3:
                    config[source.choice(["", ".", "a.b", "model"])] = source.choice(VALUES)
        config = json.loads(json.dumps(config))
        manifest = object.__new__(Manifest)
        object.__setattr__(manifest, "folder", folder)
        object.__setattr__(manifest, "config", config)
        try:
            then = config_changes.settings_then(manifest)
            config_changes.compare_for_resume(then, live, 0)
        except (CheckpointError, UserError) as error:
            number += 1
            check_line(str(error))
    return number


def test_mutated_settings_of_checkpoints(tmp_path: Path) -> None:
    assert checkpoint_settings(tmp_path, 120, 0) > 60


@pytest.mark.slow
def test_2000_mutated_settings_of_checkpoints(tmp_path: Path) -> None:
    number = checkpoint_settings(tmp_path, 2000, 1)
    print(f"2,000 mutated settings: {number} refused, each in one line; no traceback")
    assert number > 1000
