"""Checks of an untrusted Hugging Face folder before any of its files is opened.

Weights are read from safetensors only: a pickle runs code when it is opened, so files that may be
one (an optimizer's state, training arguments, an older copy of the weights) are never opened. A
file outside the folder (a path in the index, a symbolic link) is an error. Code that is part of a
checkpoint (`auto_map`) is never run; a folder that requires it is an error too, since its weights
may have another meaning than the architecture's name implies.
"""

import json
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from models.hf.messages import located, named, one_line, shown
from models.hf.safetensors_files import MappedFiles

INDEX = "model.safetensors.index.json"
JSON_BYTES = 2**24
"""Longest JSON file that is read; a tokenizer's may be longer, and its library reads it."""
INDEX_BYTES = 2**28
"""Longest index: somewhat more than 100 bytes for each of a million tensors."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
_SHARD = re.compile(r".*-(\d+)-of-(\d+)\.safetensors")
_ORIGINAL = "consolidated"
"""Mistral ships its own copy of the weights next to Hugging Face's, under this name."""


@dataclass(frozen=True)
class RawTensor:
    """A tensor as listed in its file's header."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    """Dtype in safetensors' names: F32, BF16, F8_E4M3, U8, ..."""


def inside(folder: Path, name: str) -> Path:
    """The file `name` (a relative path) of `folder`. Raises UserError if it is outside the folder
    or not a regular file.

    A snapshot in the cache of the Hugging Face hub is a folder of links into the adjacent `blobs`.
    Nothing else is ever opened: a pipe would wait for its other end, a device has no end.
    """
    path = folder / name
    try:
        roots = [folder.resolve()]
        if roots[0].parent.name == "snapshots":
            roots.append(roots[0].parent.parent / "blobs")
        within = any(path.resolve().is_relative_to(root) for root in roots)
        within = within and not Path(name).is_absolute() and ".." not in Path(name).parts
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG  # reported when it is opened
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, a zero byte
        raise UserError(f"{folder}: {named(name)} cannot be opened: {one_line(error)}") from None
    if not within:
        raise UserError(
            f"{folder}: {named(name)} leads out of the folder; only files inside it are read "
            "(copy what a link points to)"
        )
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, device or socket"
        raise UserError(f"{folder}: {named(name)} is {kind}: must be a file")
    return path


def read_json(path: Path, most_bytes: int = JSON_BYTES) -> dict[str, Any]:
    """The JSON object of a file. Raises FileNotFoundError if there is none, else UserError."""
    inside(path.parent, path.name)
    try:
        with path.open("rb") as file:
            text = file.read(most_bytes + 1)
        if len(text) > most_bytes:
            raise UserError(f"{path}: has more than {most_bytes} bytes: no such file is that long")
        content = json.loads(text.decode("utf-8"))
    except (FileNotFoundError, UserError):
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold one JSON object")
    return content


def refuse_code(raw: dict[str, Any], place: str) -> None:
    """Raise UserError if `config.json` requires Python code from the folder."""
    for key in ("auto_map", "custom_pipelines"):
        if raw.get(key):
            raise UserError(
                f"{place}: {key} = {shown(raw[key])}: requires code from the checkpoint, "
                "which is never run here and may give the weights another meaning than the "
                "architecture's"
            )


def raw_tensors(folder: Path, files: MappedFiles) -> tuple[dict[str, RawTensor], list[str]]:
    """Every tensor of the folder by its name, from the headers alone, and descriptions of ignored
    files.

    UserError: no safetensors, a missing index or shard, an index that contradicts its files, a
    tensor in two files, a file that is truncated or whose header is wrong.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {one_line(error)}") from None
    pickles = [name for name in names if name.lower().endswith(_PICKLES)]
    weight_map = _weight_map(folder)
    found = [name for name in names if name.endswith(".safetensors")]
    listed = sorted(set((weight_map or {}).values()))
    for name in listed:
        if not inside(folder, name).is_file():
            lost = [t for t, file in (weight_map or {}).items() if file == name]
            raise UserError(
                f"{located(folder / name)}: this shard is missing; {INDEX} lists it: "
                f"{len(lost)} tensors missing, the first is {named(min(lost))}"
            )
    copies = [n for n in found if n.startswith(_ORIGINAL) and n not in listed and len(found) > 1]
    used = [name for name in found if name not in copies]
    if not used:
        hint = (
            f"; {named(pickles[0])} may hold pickles, which are never opened: convert it to "
            "safetensors where you trust it"
        ) if pickles else ""  # fmt: skip
        raise UserError(f"{folder}: has no *.safetensors{hint}")
    if weight_map is None and (len(used) > 1 or _is_part(used[0])):
        raise UserError(
            f"{folder / INDEX}: missing, but the weights are in shards: {named(used[0])}"
        )
    tensors: dict[str, RawTensor] = {}
    for name in used:
        for tensor in _header(inside(folder, name), files):
            if tensor.name in tensors:
                raise UserError(
                    f"{located(folder / name)}: {named(tensor.name)} is also in "
                    f"{named(tensors[tensor.name].path.name)}"
                )
            tensors[tensor.name] = tensor
    if weight_map is not None:
        _check_index(folder, weight_map, tensors)
    left_out = [f"file {named(name)}" for name in copies]
    if pickles:
        more = f" and {len(pickles) - 1} more" if len(pickles) > 1 else ""
        left_out.append(f"file {named(pickles[0])}{more}: may hold pickles, never opened")
    return tensors, left_out


def _check_index(folder: Path, weight_map: dict[str, str], tensors: dict[str, RawTensor]) -> None:
    """Check that the index lists every tensor in the right file. Raises UserError."""
    place = f"{folder / INDEX}: weight_map"
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].path.name != file:
            raise UserError(f"{place}: {named(name)} is not in {file}")
    omitted = sorted(tensors.keys() - weight_map.keys())
    if omitted:
        raise UserError(
            f"{place}: omits {len(omitted)} tensors, the first is {named(omitted[0])} of "
            f"{named(tensors[omitted[0]].path.name)}"
        )


def _weight_map(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX
    try:
        weight_map = read_json(path, INDEX_BYTES).get("weight_map")
    except FileNotFoundError:
        return None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: weight_map: must name the file of every tensor")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise UserError(
                f"{path}: weight_map: {named(name)} = {shown(file)}: must be a *.safetensors file"
            )
    for file, name in {file: name for name, file in weight_map.items()}.items():
        try:
            inside(folder, file)
        except UserError:
            raise UserError(
                f"{path}: weight_map: {named(name)} = {shown(file)}: must be a file in this folder"
            ) from None
    return weight_map


def _is_part(name: str) -> bool:
    match = _SHARD.fullmatch(name)
    return match is not None and int(match[2]) > 1


def _header(path: Path, files: MappedFiles) -> list[RawTensor]:
    from safetensors import SafetensorError

    try:  # the library checks that the header fits the file's size, byte for byte
        file = files.file(path)
        slices = {name: file.get_slice(name) for name in file.keys()}
        return [
            RawTensor(path, name, tuple(part.get_shape()), str(part.get_dtype()))
            for name, part in slices.items()
        ]
    except (SafetensorError, OSError, struct.error, ValueError) as error:
        raise UserError(
            f"{located(path)}: unreadable safetensors file: {one_line(error)}"
        ) from None
