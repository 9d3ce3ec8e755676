"""The files of a folder, and what is passed over in it."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HIDDEN, FOLDER_LINKS = "hidden files and folders", "links to folders"
BROKEN_LINKS, SPECIAL = "links to nothing", "pipes, sockets and devices"


@dataclass(frozen=True)
class Listing:
    """What a folder and its subfolders have."""

    files: list[Path]
    """Regular files and links to such, sorted within each folder."""
    passed_over: Counter[str]
    """How many of each kind are not among them."""

    def described(self) -> str:
        """What was passed over, for a message; empty if nothing was."""
        return ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.passed_over.items()))


def list_folder(root: Path, skip: tuple[str, ...] = ()) -> Listing:
    """All files below a folder. A pipe or a device is none: reading it might never end.

    skip: names of further subfolders to leave out, as `__pycache__` is. Raises OSError.
    """
    listing = Listing([], Counter())
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        subfolders[:] = sorted(_to_enter(folder, subfolders, skip, listing.passed_over))
        for name in sorted(names):
            path = Path(folder, name)
            kind = HIDDEN if name[0] == "." else "" if path.is_file() else _kind(path)
            if kind:
                listing.passed_over[kind] += 1
            else:
                listing.files.append(path)
    return listing


def _to_enter(
    folder: str, names: list[str], skip: tuple[str, ...], passed_over: Counter[str]
) -> Iterator[str]:
    for name in names:
        if name[0] == ".":
            passed_over[HIDDEN] += 1
        elif os.path.islink(os.path.join(folder, name)):
            passed_over[FOLDER_LINKS] += 1  # it may lead back to where it is
        elif name not in ("__pycache__", *skip):
            yield name


def _kind(path: Path) -> str:
    return BROKEN_LINKS if path.is_symlink() and not path.exists() else SPECIAL


def _raise(error: OSError) -> None:
    raise error
