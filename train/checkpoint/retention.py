"""Which checkpoints are kept, and how the others are removed.

Only checkpoints that are known to be sound count: this process wrote them, or every file was
compared with the manifest. One is removed if `keep` newer ones count; as many as necessary are
compared, divided among the ranks, and remembered until one of their files changes. These are
neither counted nor removed: links (their targets may belong to others), folders without a manifest,
and anything newer than the checkpoint just written.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

from parallel.ranks import Ranks, gather_json
from train.checkpoint.manifest import CheckpointError, checkpoints, faults_of_files, read_manifest
from train.checkpoint.manifest_content import step_of

_Signature = list[tuple[str, int, int, int]]
_SOUND: dict[Path, _Signature] = {}
"""Checkpoints found sound: name, bytes, time of change and inode of each of their files."""


def remember(folder: Path) -> None:
    """Record that this process wrote the checkpoint, or compared it with its manifest."""
    _SOUND[folder.absolute()] = _signature(folder)


def prune(root: Path, written: Path, keep: int, ranks: Ranks, say: Callable[[str], None]) -> None:
    """Remove checkpoints older than the `keep` newest sound ones; all ranks call it together.

    written: the checkpoint just saved, the newest that counts. say: called on rank 0 with a line
    for each folder that could not be removed.
    """
    names = ranks.on_first(lambda: [path.name for path in _older(root, written)])
    sound, rest = 1, []
    for i, name in enumerate(names):
        if sound == keep:
            rest = [root / old for old in names[i:]]
            break
        if len(names) - i <= keep - sound:
            break  # too few to remove one of them, sound or not
        sound += _is_sound(root / name, ranks)
    if rest:
        ranks.on_first(lambda: _remove(rest, say))


def clear(root: Path) -> None:
    """Remove leftovers of killed saves, if possible."""
    for leftover in root.glob(".step-*"):
        delete(leftover)


def free_name(path: Path) -> Path:
    """`path`, or with a number appended if the name is taken by something that cannot be
    removed."""
    names = (path if i == 0 else path.with_name(f"{path.name}-{i}") for i in count())
    return next(name for name in names if not os.path.lexists(name))


def delete(path: Path) -> bool:
    """Remove a file, a link (not its target) or a folder; returns whether it was fully removed."""
    with suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            with suppress(OSError):
                path.chmod(0o700)  # a read-only folder cannot be emptied
            for child in list(path.iterdir()):
                delete(child)
            path.rmdir()
    return not os.path.lexists(path)


def _older(root: Path, written: Path) -> list[Path]:
    """The folders with a manifest of earlier steps, newest first."""
    older = [path for path in checkpoints(root) if step_of(path) < step_of(written)]
    return [path for path in reversed(older) if not path.is_symlink()]


def _is_sound(folder: Path, ranks: Ranks) -> bool:
    if ranks.on_first(lambda: _is_remembered(folder)):
        return True
    try:
        manifest = read_manifest(folder)
        fault = bool(faults_of_files(manifest, ranks.rank, ranks.world))
    except CheckpointError:
        fault = True
    if any(gather_json(fault)):
        return False
    ranks.on_first(lambda: remember(folder))
    return True


def _is_remembered(folder: Path) -> bool:
    with suppress(OSError):
        return _SOUND.get(folder.absolute()) == _signature(folder)
    return False


def _remove(folders: list[Path], say: Callable[[str], None]) -> None:
    """Rename first, so that a kill leaves no incomplete checkpoint."""
    for old in folders:
        try:
            leaving = free_name(old.with_name(f".{old.name}.leaving"))
            old.rename(leaving)
        except OSError as error:
            say(f"{old}: cannot be removed: {error.strerror}")
            continue
        if not delete(leaving):
            say(f"{leaving}: cannot be removed; delete it, the run does not need it")


def _signature(folder: Path) -> _Signature:
    found = [(e.name, e.stat(follow_symlinks=False)) for e in os.scandir(folder)]
    return sorted((name, stat.st_size, stat.st_ctime_ns, stat.st_ino) for name, stat in found)
