"""What a place for checkpoints can do. Arguments and results are JSON, so that a method can be
called in another process; checkpoints are given by the names of their folders."""

import json
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

from train.checkpoint.manifest import Manifest, manifest_text

BLOCK = 2**20
"""Bytes between two points at which a writer may change its priority."""
Signature = list[list[Any]]
"""Name, bytes and further properties of each file of a checkpoint: it changes if a file does."""


class Storage(ABC):
    """The folder of a run's checkpoints. Methods raise CheckpointError or OSError."""

    is_remote = False
    """Whether files are copied to a local folder (`fetch`) before they are read."""
    is_private = False
    """Whether only this process can read what it writes."""

    @abstractmethod
    def address(self, name: str = "") -> str:
        """The full path of a checkpoint, or of the folder of all."""

    @abstractmethod
    def check(self) -> None:
        """Raise CheckpointError if no checkpoint can be written; called before a run trains."""

    @abstractmethod
    def names(self) -> list[str]:
        """The complete checkpoints, oldest first."""

    @abstractmethod
    def begin(self, name: str, needed: int) -> str:
        """Create the empty folder to write into, after removing leftovers of killed saves; returns
        its name.

        needed: bytes of all files. Raises CheckpointError if a sound checkpoint has this name, or
        there is not enough space.
        """

    @abstractmethod
    def write(
        self, partial: str, file: str, blocks: Iterable[Any]
    ) -> Generator[None, None, dict[str, int]]:
        """Write a file and make it durable; returns its size and the CRC-32 of `blocks`.

        The checksum is that of the memory, not of the file that was read back: an error of the
        disk is noticed when the checkpoint is loaded. Yields after every BLOCK bytes.
        """

    @abstractmethod
    def commit(self, partial: str, name: str, manifest: str) -> Signature:
        """Write the manifest and give the checkpoint its name; returns its signature."""

    @abstractmethod
    def discard(self, partial: str) -> None:
        """Remove an incomplete checkpoint, which frees its space."""

    @abstractmethod
    def older(self, name: str) -> list[list[Any]]:
        """Name and signature of the checkpoints of earlier steps that may be removed, newest
        first."""

    @abstractmethod
    def faults(self, name: str, rank: int, world: int) -> dict[str, str]:
        """The errors of the files in this rank's share, or of the manifest, by name."""

    @abstractmethod
    def read_manifest(self, name: str) -> Manifest:
        """The checked manifest of a checkpoint, after comparing the sizes of all files."""

    @abstractmethod
    def remove(self, names: list[str]) -> list[str]:
        """Remove checkpoints; returns a line for each that could not be removed. A kill leaves no
        incomplete one."""

    @abstractmethod
    def set_aside(self, name: str) -> str:
        """Rename a damaged checkpoint, so that it is not selected again; returns a message. The
        newest few are kept for inspection."""

    @abstractmethod
    def signature(self, name: str) -> Signature:
        """The signature of a checkpoint."""

    def fetch(self, name: str, files: Iterable[str], folder: Path) -> None:
        """Copy files of a checkpoint to a local folder; only if the storage is remote."""
        raise NotImplementedError

    def commit_parts(
        self,
        reports: Sequence[bytes],
        partial: str,
        name: str,
        state: dict[str, Any],
        config: dict[str, Any],
    ) -> Signature:
        """`commit` with the manifest of these files: `file`, `bytes`, `crc32` and `boxes` of each,
        as JSON; empty for a rank without a file."""
        parts = [json.loads(report) for report in reports if report]
        return self.commit(partial, name, manifest_text(parts, state, config))

    def validation_losses(self, names: list[str]) -> dict[str, float]:
        """The validation loss of each checkpoint that has one."""
        losses = {}
        for name in names:
            loss = self.read_manifest(name).state.get("validation_loss")
            if type(loss) is float:
                losses[name] = loss
        return losses


def pieces(blocks: Iterable[Any]) -> Generator[memoryview, None, None]:
    """The bytes of all blocks, at most BLOCK at a time."""
    for block in blocks:
        view = memoryview(block).cast("B")
        for start in range(0, len(view), BLOCK):
            yield view[start : start + BLOCK]


def finish(work: Generator[None, None, Any]) -> Any:
    """Run all pieces of a `write` at once; returns its result."""
    while True:
        try:
            next(work)
        except StopIteration as ended:
            return ended.value
