"""The heartbeat of a rank: a file of a few bytes that the rank writes through shared memory and
the supervisor of the same host reads. Its layout is here because both need it."""

import struct
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER_VARIABLE = "PHALANX_HEARTBEATS"
"""Environment variable with the folder of the files, set by the supervisor."""
SUPERVISOR_VARIABLE = "PHALANX_SUPERVISOR"
"""Environment variable with the process id of the supervisor."""
CULPRIT = "culprit"
"""File in that folder with the number of the rank that made the attempt hang."""
HANG_CODE = 70
"""Exit code of a rank that ended because the run hangs (EX_SOFTWARE)."""
RECURRING = ("data", "forward", "backward", "optimizer", "validation")
"""Phases that recur with about the same duration."""
_LAYOUT = struct.Struct("<dddqq16s")
SIZE = _LAYOUT.size


@dataclass(frozen=True)
class Beat:
    """One record: what the main thread of a rank does."""

    since: float
    """Start of the phase, `time.monotonic()`, which all processes of a host share."""
    limit: float
    """Seconds after which the phase hangs; 0: no limit."""
    frozen_s: float
    """Seconds after which a stopped process counts as frozen; 0: never."""
    step: int
    """The running step; 0 before the first."""
    done: int
    """The last complete step."""
    phase: str

    def pack(self) -> bytes:
        """The bytes of the file."""
        phase = self.phase.encode()[:16]
        return _LAYOUT.pack(self.since, self.limit, self.frozen_s, self.step, self.done, phase)

    @property
    def recurs(self) -> bool:
        """Whether the phase has a usual duration."""
        return self.phase in RECURRING

    @property
    def place(self) -> str:
        """Description for a message."""
        return f"{self.phase} of step {self.step}" if self.step else self.phase


class Silence:
    """How long a rank has been in the same phase, in time in which this process ran itself.

    While a whole container is frozen, a virtual machine is paused, or all processes of a terminal
    are stopped, no rank can progress and none is to blame."""

    def __init__(self, longest_s: float) -> None:
        """longest_s: time between two calls of `look` that is not a pause of this process."""
        self._longest_s, self._last = longest_s, time.monotonic()
        self._since, self._seconds = 0.0, 0.0

    def look(self, since: float) -> float:
        """Seconds of silence; to be called regularly. since: start of the phase (`Beat.since`)."""
        now = time.monotonic()
        passed, self._last = min(now - self._last, self._longest_s), now
        if since == self._since:
            self._seconds += passed
        else:
            self._since, self._seconds = since, min(max(now - since, 0.0), passed)
        return self._seconds


def path_of(folder: Path, rank: int) -> Path:
    """The file of a rank."""
    return folder / f"rank-{rank:05}"


def read(folder: Path, rank: int) -> Beat | None:
    """The last record of a rank; None if it has not written one yet."""
    try:
        raw = path_of(folder, rank).read_bytes()
    except OSError:
        return None
    if len(raw) != SIZE:
        return None
    since, limit, frozen_s, step, done, phase = _LAYOUT.unpack(raw)
    name = phase.rstrip(b"\0").decode(errors="replace")
    return Beat(since, limit, frozen_s, step, done, name) if name else None
