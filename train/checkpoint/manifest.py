"""Reads `manifest.json` of a checkpoint, which is untrusted input, and checks all of it.

A checkpoint may come from any source, and a checksum only detects accidental changes. So every
name, number and type is checked here, and each file's header against the boxes that it should
contain: a checked manifest can be read safely, and no tensor is larger than its files. An error is
one line of bounded length.
"""

import json
import stat
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.loader import load
from configs.paths import is_url, local_path
from models.layers.box import Box
from train.checkpoint.manifest_content import (
    FOLDER_NAME,
    Fault,
    boxes_of,
    config_of,
    crc32_of,
    dtypes_of,
    files_of,
    parse,
    short,
    state_of,
    step_of,
)

FORMAT = 1
MANIFEST = "manifest.json"
_MOST_BYTES = 2**30
"""Largest manifest that is read: at 150 bytes per box, seven million of them."""

_REMOVE = "remove"


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read; the message names the file."""


class Unavailable(CheckpointError):
    """The storage does not answer; the checkpoint in it may be sound."""


@dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint, as its `manifest.json` lists them."""

    folder: Path
    boxes: dict[str, list[tuple[Box, str]]]
    """Tensor name -> (box, file) of every part."""
    files: dict[str, dict[str, int]]
    """File -> its `bytes` and `crc32`."""
    dtypes: dict[str, str]
    """Tensor name -> dtype as safetensors writes it; missing for a tensor without description."""
    state: dict[str, Any]
    config: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


def path_of(root: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return root / f"step-{step:08d}"


def checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints under `root`, oldest first."""
    found = (path.parent for path in root.glob(f"step-*/{MANIFEST}"))
    return sorted((path for path in found if FOLDER_NAME.fullmatch(path.name)), key=step_of)


def find(path: Path) -> Path:
    """The checkpoint at `path`: itself, or the newest below it or its `checkpoints`."""
    try:
        if (path / MANIFEST).is_file():
            return path
        found = checkpoints(path) or checkpoints(_root_of(path))
        why = "holds no checkpoint" if path.is_dir() else "no such folder"
    except OSError as error:
        found, why = [], str(error.strerror)
    if not found:
        raise CheckpointError(
            f"{short(str(path))}: {why}; name a run folder or one of its checkpoints"
        )
    return found[-1]


def _root_of(run: Path) -> Path:
    """The folder of a run's checkpoints."""
    file = run / "config.toml"
    setting = load(file).checkpoint.dir if file.is_file() else ""
    if is_url(setting):
        raise CheckpointError(f"{run}: its checkpoints are in {setting}; copy one to a folder")
    return local_path(setting) if setting else run / "checkpoints"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, after checking its checksum and the sizes of all files."""
    path = folder / MANIFEST
    try:
        text = _read(path)
    except (OSError, ValueError) as error:
        why = str(error) if isinstance(error, Fault) else short(f"{type(error).__name__}: {error}")
        raise CheckpointError(f"{path}: unreadable: {why}; {_remedy(folder)}") from None
    manifest = parse_manifest(text, folder)
    _check_sizes(folder, manifest.files)
    return manifest


def parse_manifest(text: str, folder: Path) -> Manifest:
    """The checked content of a manifest, without a look at the files in `folder`."""
    path = folder / MANIFEST
    try:
        content = parse(text)
        written = content.get("format")
        if type(written) is not int or written != FORMAT:
            raise CheckpointError(f"{path}: format {short(written)}, expected {FORMAT}")
        if content.pop("crc32", None) != crc32_of(content):
            raise CheckpointError(f"{path}: damaged (checksum differs); {_remedy(folder)}")
        files, boxes = files_of(content), boxes_of(content)
        dtypes = dtypes_of(content)
        state, config = state_of(content, folder), config_of(content)
    except CheckpointError:
        raise
    except Fault as fault:
        raise CheckpointError(f"{path}: unreadable: {fault}; {_remedy(folder)}") from None
    except (ValueError, RecursionError) as error:
        why = short(f"{type(error).__name__}: {error}")
        raise CheckpointError(f"{path}: unreadable: {why}; {_remedy(folder)}") from None
    return Manifest(folder, boxes, files, dtypes, state, config)


def manifest_text(
    reports: Iterable[dict[str, Any]], state: dict[str, Any], config: dict[str, Any]
) -> str:
    """The text of a manifest. reports: `file`, `bytes`, `crc32` and `boxes` of each file."""
    written = list(reports)
    content = {
        "format": FORMAT,
        "state": state,
        "config": config,
        "files": {r["file"]: {"bytes": r["bytes"], "crc32": r["crc32"]} for r in written},
        "boxes": [{**box, "file": r["file"]} for r in written for box in r["boxes"]],
    }
    content["crc32"] = crc32_of(content)
    return json.dumps(content)


def is_valid(folder: Path) -> bool:
    """Whether the folder's manifest can be read and its files have the right sizes."""
    try:
        read_manifest(folder)
    except CheckpointError:
        return False
    return True


def verify_files(manifest: Manifest) -> None:
    """Compare every file with the manifest: the checksum, and the names, shapes and dtypes in the
    header. Raises CheckpointError."""
    raise_faults(manifest, faults_of_files(manifest))


def raise_faults(manifest: Manifest, faults: dict[str, str]) -> None:
    """Raise CheckpointError for the first of the files with errors, if there are any."""
    if faults:
        file = min(faults)
        raise CheckpointError(
            f"{manifest.folder / file}: {faults[file]}; {_remedy(manifest.folder)}"
        )


def faults_of_files(manifest: Manifest, rank: int = 0, world: int = 1) -> dict[str, str]:
    """The errors of the files in this rank's share, by name."""
    listed: dict[str, list[tuple[str, Box]]] = {}
    for name, parts in manifest.boxes.items():
        for box, file in parts:
            listed.setdefault(file, []).append((name, box))
    mine = sorted(manifest.files)[rank::world]
    found: dict[str, str] = {}
    for file in mine:
        if fault := _fault_of_file(manifest, file, listed.get(file, [])):
            found[file] = fault
    return found


def crc32(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            crc = zlib.crc32(block, crc)
    return crc


def _read(path: Path) -> str:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # reading a FIFO would wait forever
        raise Fault("not a file")
    if found.st_size > _MOST_BYTES:
        raise Fault(f"{found.st_size} bytes, at most {_MOST_BYTES} are read")
    return path.read_text("utf-8")


def _check_sizes(folder: Path, files: dict[str, dict[str, int]]) -> None:
    inside = folder.resolve()
    for name, facts in files.items():
        file = folder / name
        if Path(name).name != name:
            raise CheckpointError(f"{folder / MANIFEST}: {short(name)}: missing; {_remedy(folder)}")
        if not _is_file(file) or file.resolve().parent != inside:
            raise CheckpointError(f"{folder / short(name)}: missing; {_remedy(folder)}")
        size = file.stat().st_size
        if size != facts["bytes"]:
            raise CheckpointError(
                f"{file}: {size} bytes, expected {facts['bytes']}; {_remedy(folder)}"
            )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than any file's
        return False


def _fault_of_file(manifest: Manifest, file: str, boxes: Iterable[tuple[str, Box]]) -> str | None:
    """The error of a file; None if it matches the manifest."""
    from safetensors import SafetensorError, safe_open

    path = manifest.folder / file
    try:
        if crc32(path) != manifest.files[file]["crc32"]:
            return "damaged (checksum differs)"
        with safe_open(path, framework="np") as content:  # only the header: without torch
            held = set(content.keys())
            for name, box in boxes:
                if name not in held:
                    return f"does not hold {short(name)}"
                part = content.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                if shape != box.shape:
                    return f"{short(name)} has shape {list(shape)}, listed as {list(box.shape)}"
                if manifest.dtypes.get(name, dtype) != dtype:
                    return f"{short(name)} is {dtype}, listed as {manifest.dtypes[name]}"
    except (OSError, SafetensorError) as error:
        return f"unreadable: {short(str(error))}"
    return None


def _remedy(folder: Path) -> str:
    others = [path for path in checkpoints(folder.parent) if path != folder]
    return f"{_REMOVE} {folder} to use {others[-1].name}" if others else f"{_REMOVE} {folder}"


def without_remedy(error: str) -> str:
    """An error of a checkpoint without the advice at its end."""
    return error.rpartition(f"; {_REMOVE} ")[0] or error
