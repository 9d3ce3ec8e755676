"""The results of the suite, complete on disk after every one of them."""

import json
from pathlib import Path
from typing import Any

from train.atomic_files import replace_text


class Report:
    """Facts about machine and suite; for every section its checks, its timings, and for both parts
    how they ended."""

    def __init__(self, path: Path | None, names: list[str]) -> None:
        """path: of the JSON file; None: none. names: of the sections."""
        self.path = path
        self.value: dict[str, Any] = {"sections": {name: _empty() for name in names}}
        self.write()

    def section(self, name: str) -> dict[str, Any]:
        """The part of a section, to be changed in place."""
        found: dict[str, Any] = self.value["sections"][name]
        return found

    def timings(self, name: str) -> list[dict[str, Any]]:
        """The rows of a section that is not chosen are none."""
        rows: list[dict[str, Any]] = self.value["sections"].get(name, _empty())["timings"]
        return rows

    def write(self) -> None:
        """Replace the file: a reader finds the previous content or this one, at any moment. If it
        cannot be written, the suite continues without it."""
        if self.path is None:
            return
        try:
            replace_text(self.path, json.dumps(self.value, indent=1, allow_nan=False))
        except OSError as error:
            print(f"not written from here on: {self.path}: {error.strerror}", flush=True)
            self.path = None

    def failed(self, name: str) -> list[dict[str, Any]]:
        """The checks of a section that failed. NaN is not in a JSON file: it is None there."""
        return [
            check for check in self.section(name)["checks"]
            if check["figure"] is None or not check["figure"] <= check["limit"]
        ]  # fmt: skip


def _empty() -> dict[str, Any]:
    part = {"state": "not started", "reason": "", "seconds": 0.0}
    return {"checks": [], "timings": [], "check": dict(part), "measure": dict(part)}
