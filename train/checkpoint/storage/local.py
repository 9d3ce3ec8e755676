"""Checkpoints in a folder of a local or network file system.

A checkpoint is written to a folder with a temporary name, fsynced, and renamed. Names with a
leading `.step-` are incomplete or being removed; names with a leading `damaged-` were set aside
when a run resumed. Loaders ignore both.
"""

import os
import zlib
from collections.abc import Generator, Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from train.atomic_files import naming, replace_text, sync
from train.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    checkpoints,
    faults_of_files,
    is_valid,
    read_manifest,
)
from train.checkpoint.manifest_content import step_of
from train.checkpoint.storage.base import Signature, Storage, pieces

_SYNCED_BYTES = 2**26
"""Bytes after which a file is flushed: the system's caches never hold more of it."""
_MOST_DAMAGED = 2
"""Number of damaged checkpoints that are kept for inspection."""


class LocalStorage(Storage):
    """The folder `root` of a run's checkpoints."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def address(self, name: str = "") -> str:
        return str((self.root / name).absolute())

    def check(self) -> None:
        why = "this is no folder; move it away"
        try:
            if self.root.is_dir() or not os.path.lexists(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
                probe = free_name(self.root / ".step-probe")
                probe.mkdir()
                probe.rmdir()
                return
        except OSError as error:
            why = f"cannot be written: {error.strerror}"
        raise CheckpointError(f"{self.root}: {why}")

    def names(self) -> list[str]:
        return [path.name for path in checkpoints(self.root)]

    def begin(self, name: str, needed: int) -> str:
        final = self.root / name
        if os.path.lexists(final) and not faults_of(final):
            raise CheckpointError("it exists already")
        self.root.mkdir(parents=True, exist_ok=True)
        for leftover in self.root.glob(".step-*"):
            delete(leftover)
        system = os.statvfs(self.root)
        free = system.f_bavail * system.f_frsize
        if free < needed:
            raise CheckpointError(
                f"{self.root}: no space: {needed:,} bytes are needed, {free:,} are free"
            )
        sync(self.root.parent)
        partial = free_name(self.root / f".{name}.partial")
        partial.mkdir()
        return partial.name

    def write(
        self, partial: str, file: str, blocks: Iterable[Any]
    ) -> Generator[None, None, dict[str, int]]:
        path, size, crc, pending = self.root / partial / file, 0, 0, 0
        with naming(path), path.open("wb", buffering=0) as out:
            for piece in pieces(blocks):
                crc = zlib.crc32(piece, crc)
                size += len(piece)
                pending += len(piece)
                while piece:
                    piece = piece[out.write(piece) :]
                if pending >= _SYNCED_BYTES:
                    os.fsync(out.fileno())
                    pending = 0
                yield
            os.fsync(out.fileno())
        return {"bytes": size, "crc32": crc}

    def commit(self, partial: str, name: str, manifest: str) -> Signature:
        folder, final = self.root / partial, self.root / name
        replace_text(folder / MANIFEST, manifest)
        sync(folder)
        damaged = None
        if os.path.lexists(final):  # `begin` found that it is no checkpoint
            damaged = free_name(final.with_name(f".{name}.damaged"))
            final.rename(damaged)
        folder.rename(final)
        sync(self.root)
        if damaged is not None:
            delete(damaged)
        return self.signature(name)

    def discard(self, partial: str) -> None:
        delete(self.root / partial)

    def older(self, name: str) -> list[list[Any]]:
        found = [path for path in checkpoints(self.root) if step_of(path) < step_of(Path(name))]
        kept = [path.name for path in reversed(found) if not path.is_symlink()]
        return [[name, self.signature(name)] for name in kept]

    def faults(self, name: str, rank: int, world: int) -> dict[str, str]:
        return faults_of(self.root / name, rank, world)

    def read_manifest(self, name: str) -> Manifest:
        return read_manifest(self.root / name)

    def remove(self, names: list[str]) -> list[str]:
        lines = []
        for old in (self.root / name for name in names):
            try:
                leaving = free_name(old.with_name(f".{old.name}.leaving"))
                old.rename(leaving)
            except OSError as error:
                lines.append(f"{old}: cannot be removed: {error.strerror}")
                continue
            if not delete(leaving):
                lines.append(f"{leaving}: cannot be removed; delete it, the run does not need it")
        return lines

    def set_aside(self, name: str) -> str:
        folder = self.root / name
        aside = free_name(self.root / f"damaged-{name}")
        try:
            folder.rename(aside)
            os.utime(aside, follow_symlinks=False)  # of several, the last is the newest
        except OSError as error:
            if not os.path.lexists(aside):
                return f"{folder}: cannot be set aside: {error.strerror}"
        old = sorted(self.root.glob("damaged-step-*"), key=lambda path: path.lstat().st_mtime_ns)
        for path in old[:-_MOST_DAMAGED]:
            delete(path)
        return f"{folder}: renamed to {aside.name}"

    def signature(self, name: str) -> Signature:
        found = [(e.name, e.stat(follow_symlinks=False)) for e in os.scandir(self.root / name)]
        return sorted([n, s.st_size, s.st_ctime_ns, s.st_ino] for n, s in found)


def faults_of(folder: Path, rank: int = 0, world: int = 1) -> dict[str, str]:
    """The errors of the files in this rank's share, or of the manifest, by name."""
    if not is_valid(folder):
        return {MANIFEST: "unreadable"}
    try:
        return faults_of_files(read_manifest(folder), rank, world)
    except CheckpointError as error:
        return {MANIFEST: str(error)}


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
