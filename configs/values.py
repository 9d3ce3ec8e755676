"""Parse the text of an experiment to a tree of values: the TOML file, and one override.

Both are untrusted input, so their size is limited before they are parsed, and every error of the
parser becomes one ConfigError. Types are checked later, in `configs.tree`.
"""

import difflib
import os
import stat
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from configs.errors import ConfigError, shortened
from configs.rules import shown
from configs.schema import JobConfig
from configs.tree import nearest

_LARGEST_FILE = 2**20
"""Bytes; the longest shipped experiment has 2 thousand."""
_LONGEST_OVERRIDE = 2**16
"""Characters."""


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file. Raises ConfigError, in one line, if it cannot be read."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or pipe"
            raise ConfigError(f"{_name(path)}: this is {kind}; name a TOML file")
        with open(path, "rb") as file:
            raw = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        raise ConfigError(f"{_name(path)}: no such file; did you mean {_shipped(path)}?") from None
    except OSError as error:
        raise ConfigError(f"{_name(path)}: cannot be read: {error.strerror}") from None
    except ConfigError:
        raise
    except ValueError:  # Python allows no NUL in a path
        raise ConfigError(f"{_name(path)}: no file can have this name") from None
    if len(raw) > _LARGEST_FILE:
        raise ConfigError(f"{_name(path)}: larger than 1 MiB, so it is no experiment")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{_name(path)}: cannot be read: not UTF-8 text (byte {error.start})"
        ) from None
    return _parse(text, _name(path))


def _name(path: Path) -> str:
    return shortened(str(path), 200)


def _shipped(path: Path) -> Path:
    """The shipped experiment with the most similar name."""
    here = Path(__file__).resolve().parent
    shipped = {file.name: file for file in here.rglob("*.toml") if file.is_file()}
    shipped |= {file.name: file for file in here.glob("*.toml") if file.is_file()}
    near = difflib.get_close_matches(path.name[:100], shipped, n=1, cutoff=0.75) or ["demo.toml"]
    file = shipped[near[0]]
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


def _parse(text: str, place: str) -> dict[str, Any]:
    import tomli

    try:
        return tomli.loads(text)
    except RecursionError as error:
        problem = str(error) or "nested too deep"
    except tomli.TOMLDecodeError as error:
        problem = str(error)
    except ValueError:  # raised by Python's int
        problem = "an integer of thousands of digits; the largest is 2^63 - 1"
    raise ConfigError(f"{place}: not valid TOML: {shortened(problem, 200)}")


def apply_override(tree: dict[str, Any], override: str, places: dict[str, str]) -> None:
    """Set the key of `--section.key=value` in `tree`; `places` records which override set it."""
    key, equals, text = override.removeprefix("--").partition("=")
    place = shortened(override[:_LONGEST_OVERRIDE], 120)
    if not override.startswith("--") or not equals or "." not in key:
        raise ConfigError(f"{place}: an override has the form --section.key=value")
    if len(override) > _LONGEST_OVERRIDE:
        raise ConfigError(f"{place}: longer than {_LONGEST_OVERRIDE} characters")
    kind = _check_key(key, place)
    value = _value(kind, text, place)
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):  # set by the file or an earlier override
            return
        node = child
    node[leaf] = value
    # this override replaces earlier ones of this key and of its parts
    for below in [known for known in places if f"{known}.".startswith(f"{key}.")]:
        del places[below]
    places[key] = place


def _check_key(dotted: str, place: str) -> Any:
    """The annotated type at a dotted key. Raises ConfigError if there is none."""
    kind: Any = JobConfig
    *sections, leaf = dotted.split(".")
    for depth, part in enumerate([*sections, leaf]):
        hints = get_type_hints(kind)
        prefix = "".join(f"{section}." for section in sections[:depth])
        if part not in hints:
            raise ConfigError(f"{place}: unknown key; {nearest(part, prefix, hints)}")
        kind = hints[part]
        if depth < len(sections) and not is_dataclass(kind):
            raise ConfigError(f"{place}: {part} is a key, not a section")
    return kind


def _value(kind: Any, text: str, place: str) -> Any:
    """Parse the value of an override: TOML, but strings and choices may have no quotes."""
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'"
    if kind is str and not quoted:
        return text
    if "\n" in text or "\r" in text:
        raise ConfigError(f"{place}: a line break in the value; give one value in one line")
    import tomli

    try:
        # within a list, too: a comment would include the bracket, so all of the text is the value
        tomli.loads(f"value = [{text}]")
        return tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError as error:
        if quoted:
            raise ConfigError(
                f"{place}: not a TOML string ({shortened(str(error), 100)}); write the value "
                "without quotes"
            ) from None
        return text  # unquoted: for a choice such as "bf16"; other types raise later
    except (RecursionError, ValueError):
        raise ConfigError(f"{place} = {shown(text)}: nested too deep, or too many digits") from None
