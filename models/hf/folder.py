"""A Hugging Face folder somebody else made: what may be opened, before anything is.

Weights are read from safetensors only: a pickle runs code when it is opened, so a folder that holds
one is refused, and so is every file that lies outside (a path in the index, a symbolic link). Code
that comes with a checkpoint (`auto_map`) is never run here; a folder that asks for it is refused
too, since its weights may mean something else than the architecture's name says.
"""

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.rules import ConfigError
from models.hf.mapped import MappedFiles

INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
_SHARD = re.compile(r".*-(\d+)-of-(\d+)\.safetensors")
_ORIGINAL = "consolidated"
"""Mistral ships its own copy of the weights beside Hugging Face's, under this name."""


@dataclass(frozen=True)
class RawTensor:
    """A tensor as its file's header lists it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    """In safetensors' names: F32, BF16, F8_E4M3, U8, ..."""


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`; ConfigError where it lies elsewhere."""
    path = folder / name
    if Path(name).name != name or not path.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"{folder}: {name} leads out of the folder; only files inside it are read "
            "(copy what a link points to)"
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file. FileNotFoundError where there is none, else ConfigError."""
    inside(path.parent, path.name)
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold one JSON object")
    return content


def refuse_code(raw: dict[str, Any], place: str) -> None:
    """Raise ConfigError where `config.json` asks for Python code of the folder."""
    for key in ("auto_map", "custom_pipelines"):
        if raw.get(key):
            raise ConfigError(
                f"{place}: {key} = {raw[key]!r}: asks for code that comes with the weights; it is "
                "never run here, and may be why they mean something else than the architecture says"
            )


def raw_tensors(folder: Path, files: MappedFiles) -> tuple[dict[str, RawTensor], list[str]]:
    """Every tensor of the folder by its name, from the headers alone, and the files left out.

    ConfigError: pickles, no safetensors, a missing index or shard, an index that contradicts its
    files, a file that is cut off or whose header is wrong.
    """
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.lower().endswith(_PICKLES)]
    if pickles:
        raise ConfigError(
            f"{folder}: pickles such as {pickles[0]} are not read: opening one can run code; "
            "convert it to safetensors, or remove it where safetensors exist"
        )
    weight_map = _weight_map(folder)
    found = [name for name in names if name.endswith(".safetensors")]
    listed = sorted(set(weight_map.values())) if weight_map is not None else []
    for name in listed:
        if not inside(folder, name).is_file():
            lost = [t for t, file in (weight_map or {}).items() if file == name]
            raise ConfigError(
                f"{folder / name}: this shard is missing; {INDEX} lists it: "
                f"{len(lost)} tensors missing, the first is {min(lost)}"
            )
    copies = [n for n in found if n.startswith(_ORIGINAL) and n not in listed and len(found) > 1]
    used = [name for name in found if name not in copies]
    if not used:
        raise ConfigError(f"{folder}: has no *.safetensors")
    if weight_map is None and (len(used) > 1 or _is_part(used[0])):
        raise ConfigError(f"{folder / INDEX}: missing, but the weights are in shards: {used[0]}")
    tensors: dict[str, RawTensor] = {}
    for name in used:
        for tensor in _header(inside(folder, name), files):
            if tensor.name in tensors:
                raise ConfigError(
                    f"{folder / name}: {tensor.name} is also in {tensors[tensor.name].path.name}"
                )
            tensors[tensor.name] = tensor
    for name, file in (weight_map or {}).items():
        if name not in tensors or tensors[name].path.name != file:
            raise ConfigError(f"{folder / INDEX}: weight_map: {name} is not in {file}")
    return tensors, copies


def _weight_map(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX
    try:
        weight_map = read_json(path).get("weight_map")
    except FileNotFoundError:
        return None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{path}: weight_map: must name the file of every tensor")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise ConfigError(
                f"{path}: weight_map: {name} = {file!r}: must be a *.safetensors file"
            )
        try:
            inside(folder, file)
        except (ConfigError, ValueError):  # ValueError: a zero byte in the name
            raise ConfigError(
                f"{path}: weight_map: {name} = {file!r}: must be a file in this folder"
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
        raise ConfigError(f"{path}: unreadable safetensors file: {error}") from None
