"""The folder of an attempt's heartbeats: on the host's own disk, because ranks write it through
shared memory, and therefore outside of the run's folder.

A supervisor that is killed cannot remove its folder, so the next one of the same user does. A
folder is in use while its supervisor has locked it; the kernel unlocks it when the process ends,
however it ends.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "phalanx-rank-heartbeats-"


@contextmanager
def heartbeat_folder() -> Iterator[Path]:
    """A new folder, removed at the end; removes those that ended supervisors have left."""
    remove_left_folders()
    folder, lock = _locked_folder()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked_folder() -> tuple[Path, int]:
    """A new folder, and the descriptor that keeps it locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        lock = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # without locks nothing is ever removed
            fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), folder.stat()):
                return folder, lock
        os.close(lock)  # another supervisor has removed it before it was locked


def remove_left_folders() -> None:
    """Remove all folders of this user that no supervisor uses."""
    with suppress(OSError):
        found = [entry.path for entry in os.scandir(tempfile.gettempdir()) if _is_own(entry)]
        for path in found:
            _remove_unlocked(path)


def _is_own(entry: os.DirEntry[str]) -> bool:
    if not entry.name.startswith(_PREFIX):
        return False
    with suppress(OSError):  # another supervisor removes it now
        own = entry.stat(follow_symlinks=False).st_uid == os.getuid()
        return own and entry.is_dir(follow_symlinks=False)
    return False


def _remove_unlocked(path: str) -> None:
    with suppress(OSError):
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)
