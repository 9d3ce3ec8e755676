"""What one preparation does, in a file that its processes share, and the results of its units.

The folder of an unfinished preparation is `OUT.preparing`:

    plan.json            units, identity of the inputs, options
    scan/N.npz           of each document of unit N: status, digest, size, signature
    scan/N.json          counts of unit N; written last
    decisions.bin        of each document of all units: dropped, train or validation
    tokenizer.json, tokenizer_config.json
    encode/N.*.bin       tokens and lengths of the documents of unit N
    encode/N.json        counts; written last

Every file is written under another name, which has the process's number, and renamed. So a killed
preparation continues with what is there, if inputs and options are the same, and a process that
outlives it disturbs nothing.
"""

import hashlib
import importlib.metadata
import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from configs.errors import UserError
from train.atomic_files import naming
from train.data.documents import shown
from train.prepare.inputs import Unit, stamp

FORMAT = 1


@dataclass(frozen=True)
class Options:
    """Options that determine the tokens."""

    sources: tuple[str, ...]
    text_field: str
    unreadable: str
    """refuse or skip"""
    tokenizer: str
    """Path of a tokenizer.json; empty: one is trained."""
    train_vocab: int
    special_tokens: tuple[str, ...]
    validation_fraction: float
    near_duplicate_threshold: float


@dataclass(frozen=True)
class Plan:
    options: Options
    units: list[Unit]
    stamps: list[list[Any]]
    tokenizer_sha256: str

    @property
    def key(self) -> str:
        """Hash of everything that determines the result."""
        versions = [importlib.metadata.version("tokenizers"), FORMAT]
        return hashlib.sha256(json.dumps([self._content(), versions]).encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        return {
            "options": asdict(self.options),
            "units": [asdict(unit) for unit in self.units],
            "stamps": self.stamps,
            "tokenizer_sha256": self.tokenizer_sha256,
        }

    def text(self) -> str:
        """The content of plan.json."""
        return json.dumps(self._content() | {"key": self.key}) + "\n"

    def check_inputs(self, unit: Unit) -> None:
        """Raise UserError if a file of a unit is not the one that was planned."""
        for name in unit.files:
            known = self._stamp_of.get(name)
            try:
                same = known is None or stamp(Path(name)) == known
            except OSError:
                same = False
            if not same:
                raise UserError(
                    f"{shown(name)}: changed or removed while it was prepared; start again"
                )

    @cached_property
    def _stamp_of(self) -> dict[str, list[Any]]:
        return {entry[0]: entry for entry in self.stamps}


def partial_of(path: Path) -> Path:
    """The name under which this process writes `path`."""
    return path.with_name(f".{os.getpid()}.partial.{path.name}")


def write_bytes(path: Path, raw: bytes) -> None:
    """Write a file of a unit so that it is complete or absent."""
    partial = partial_of(path)
    with naming(partial):
        partial.write_bytes(raw)
    partial.rename(path)


def read_plan(work: Path) -> Plan:
    """The plan in a folder. Raises OSError, ValueError, KeyError or TypeError."""
    content = json.loads((work / "plan.json").read_text("utf-8"))
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in content["options"].items()
    }
    units = [Unit(**unit | {"files": tuple(unit["files"])}) for unit in content["units"]]
    return Plan(Options(**options), units, content["stamps"], content["tokenizer_sha256"])
