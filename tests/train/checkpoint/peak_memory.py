"""Memory that a piece of code needs at most, of any library and thread."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PROCESS = Path("/proc/self")
POSSIBLE = (_PROCESS / "clear_refs").is_file()


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Within, measure the largest resident memory in addition to that at the start; the only
    element of the list is its size in bytes, after the block; 0 unless `POSSIBLE`.

    tracemalloc counts Python's memory only, and stopping it while another thread allocates can
    crash the process (python/cpython#128679).
    """
    peak = [0]
    if not POSSIBLE:
        yield peak
        return
    (_PROCESS / "clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    yield peak
    peak[0] = _status("VmHWM") - before


def _status(name: str) -> int:
    found = re.search(rf"(?m)^{name}:\s+(\d+) kB$", (_PROCESS / "status").read_text())
    assert found is not None
    return 1024 * int(found[1])
