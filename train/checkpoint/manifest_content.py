"""The content of a `manifest.json`, checked: every key, type, name and number.

Checked content has boxes within their tensors and enough of them for each whole tensor, sizes that
fit 64 bits, and names and strings of bounded length. Otherwise a `Fault` with one line of bounded
length is raised.
"""

import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

from models.layers.box import Box

LONGEST_NAME = 1000
_LONGEST_TEXT = 4096
"""Longest string of state and config: the length limit of a path."""
_LARGEST = 2**62
"""Largest size, offset or step; their sums fit 64 bits."""
_MOST_TABLES = 3
"""Levels of tables within lists of tables."""
_MOST_DIMENSIONS = 16
FOLDER_NAME = re.compile(r"step-[0-9]{8,18}")


class Fault(ValueError):
    """An error in a manifest; it becomes a CheckpointError with the file's name."""


def short(value: object, longest: int = 120) -> str:
    """`value` for an error message: printable, on one line, shortened if it is long."""
    text = value if isinstance(value, str) else repr(value)
    text = text[: longest + 1]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= longest else text[:longest] + "..."


def crc32_of(content: dict[str, Any]) -> int:
    """CRC-32 of a manifest without its `crc32`."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def parse(text: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise Fault(f"the key {short(twice)} twice in one object")
        return made

    def constant(text: str) -> Any:
        raise Fault(f"{text} is no JSON number")

    content = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    if not isinstance(content, dict):
        raise Fault("not a JSON object")
    return content


def _entry(content: dict[str, Any], key: str, kind: type) -> Any:
    """`content[key]`, of exactly the type `kind`: a boolean is no integer."""
    value = content.get(key)
    if type(value) is not kind:
        what = "is missing" if key not in content else f"= {short(value)} is no {kind.__name__}"
        raise Fault(f"{key} {what}")
    return value


def _size(value: object, what: str, most: int = _LARGEST) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise Fault(f"{what} = {short(value)}: must be an integer from 0 to {most}")
    return value


def _name(value: object, what: str) -> str:
    if type(value) is not str or not 0 < len(value) <= LONGEST_NAME or not value.isprintable():
        raise Fault(
            f"{what} = {short(value)}: must be a string of 1 to {LONGEST_NAME} printable characters"
        )
    return value


def files_of(content: dict[str, Any]) -> dict[str, dict[str, int]]:
    files: dict[str, dict[str, int]] = {}
    for name, facts in _entry(content, "files", dict).items():
        _name(name, "file")
        if type(facts) is not dict:
            raise Fault(f"files: {short(name)} = {short(facts)}: must be an object")
        files[name] = {
            "bytes": _size(facts.get("bytes"), f"bytes of {short(name)}"),
            "crc32": _size(facts.get("crc32"), f"crc32 of {short(name)}", 2**32 - 1),
        }
    return files


def boxes_of(content: dict[str, Any]) -> dict[str, list[tuple[Box, str]]]:
    """The boxes by tensor name: each within its tensor, together enough to cover it."""
    boxes: dict[str, list[tuple[Box, str]]] = {}
    for entry in _entry(content, "boxes", list):
        if type(entry) is not dict:
            raise Fault(f"boxes: {short(entry)}: must be an object")
        name, file = _name(entry.get("name"), "name"), _name(entry.get("file"), "file")
        whole, offset, shape = (_axes(entry, key) for key in ("whole", "offset", "shape"))
        if not len(whole) == len(offset) == len(shape):
            raise Fault(f"a box of {short(name)}: whole, offset and shape differ in length")
        if any(o + n > size for size, o, n in zip(whole, offset, shape, strict=True)):
            raise Fault(f"a box of {short(name)} leaves its tensor")
        if file not in content["files"]:
            raise Fault(f"{short(name)} lies in {short(file)}, which is not listed")
        boxes.setdefault(name, []).append((Box(whole, offset, shape), file))
    for name, parts in boxes.items():
        wholes = {box.whole for box, _ in parts}
        if len(wholes) > 1:
            raise Fault(f"{short(name)} has several shapes: {short(sorted(wholes))}")
        held, asked = sum(math.prod(box.shape) for box, _ in parts), math.prod(wholes.pop())
        if held < asked:
            raise Fault(f"{short(name)} is incomplete: {held} of {asked} elements")
    return boxes


def _axes(entry: dict[str, Any], key: str) -> tuple[int, ...]:
    values = entry.get(key)
    what = f"{key} of {short(entry['name'])}"
    if type(values) is not list or len(values) > _MOST_DIMENSIONS:
        raise Fault(f"{what} = {short(values)}: must be a list of {_MOST_DIMENSIONS} at most")
    axes = tuple(_size(value, what) for value in values)
    if math.prod(axes) > _LARGEST:
        raise Fault(f"{what} = {short(values)}: too large")
    return axes


def dtypes_of(content: dict[str, Any]) -> dict[str, str]:
    """The dtypes by tensor name; missing in checkpoints written before dtypes were listed."""
    dtypes: dict[str, str] = {}
    for entry in content["boxes"]:
        if "dtype" in entry:
            name, dtype = entry["name"], short(entry["dtype"])
            if dtypes.setdefault(name, dtype) != dtype:
                raise Fault(f"{short(name)} has several dtypes: {dtypes[name]} and {dtype}")
    return dtypes


def state_of(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = _entry(content, "state", dict)
    step = _size(state.get("step"), "state: step")
    if FOLDER_NAME.fullmatch(folder.name) and step_of(folder) != step:
        raise Fault(f"state: step = {step}, the folder says {step_of(folder)}")
    _check_scalars("state", state)
    return state


def config_of(content: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = _entry(content, "config", dict)
    _check_scalars("config", config)
    sections = {key[:i] for key in config for i, c in enumerate(key) if c == "."}
    for key in sections & config.keys():
        raise Fault(f"config: {short(key)} is a key and a section")
    return config


def _check_scalars(what: str, content: dict[str, Any]) -> None:
    """Check that values are scalars, lists of them or lists of tables (`data.blend`), as settings
    are, and no longer than a path."""
    for key, value in content.items():
        _name(key, f"{what}: key")
        items = value if type(value) is list else [value]
        for item in items:
            if type(value) is list and type(item) is dict and what.count(".") < _MOST_TABLES:
                _check_scalars(f"{what}.{short(key)}", item)
                continue
            if item is not None and type(item) not in (bool, int, float, str):
                raise Fault(f"{what}: {short(key)} = {short(value)}: must be a scalar or a list")
            if type(item) is str and len(item) > _LONGEST_TEXT:
                raise Fault(f"{what}: {short(key)}: a string of {len(item)} characters")
            if type(item) is float and not math.isfinite(item):  # 1e999
                raise Fault(f"{what}: {short(key)} = {item}: must be a finite number")
