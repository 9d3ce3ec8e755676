"""From a TOML file and `--section.key=value` overrides to one frozen `RunConfig`, and back.

Strict on purpose: an unknown key names its nearest neighbour, a wrong type says which was
expected, and every message begins with where the value came from (the file or the override).
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from configs.rules import ConfigError
from configs.schema import RunConfig


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read an experiment.

    path: TOML file. overrides: strings of the form `--section.key=value`, the value in TOML
    syntax (strings may go without quotes). Raises ConfigError: one line with place and remedy.
    """
    path = Path(path)
    tree = _read_toml(path)
    places: dict[str, str] = {}
    for override in overrides:
        _apply_override(tree, override, places)
    config: RunConfig = _build(RunConfig, tree, "", str(path), places)
    return config


def parse_arguments(arguments: Sequence[str]) -> tuple[str, list[str], int | None]:
    """The experiment file, the overrides and the value of `--ranks` (N or =N) of a command line."""
    files, overrides, ranks = [], [], None
    rest = iter(arguments)
    for argument in rest:
        name, _, value = argument.partition("=")
        if name == "--ranks":
            value = value or next(rest, "")
            if not (value.isascii() and value.isdigit()) or int(value) < 1:
                raise ConfigError(f"--ranks {value}: must be a positive integer")
            ranks = int(value)
        elif argument.startswith("--"):
            overrides.append(argument)
        else:
            files.append(argument)
    if len(files) != 1:
        raise ConfigError(
            f"{len(files)} experiment files given, expected one: FILE.toml "
            "[--section.key=value ...] [--ranks N]"
        )
    return files[0], overrides, ranks


def from_dict(tree: dict[str, Any], place: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The config that `asdict` made `tree` of, changed by overrides as in `load`.

    place: what an error calls its origin.
    """
    places: dict[str, str] = {}
    for override in overrides:
        _apply_override(tree, override, places)
    config: RunConfig = _build(RunConfig, tree, "", place, places)
    return config


def to_toml(config: RunConfig) -> str:
    """The complete experiment as TOML, defaults included; `load` reads it back unchanged."""
    import tomli_w

    return tomli_w.dumps(asdict(config))


def flatten(config: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted key, as `{"train.steps": 100, ...}`; JSON types only."""
    flat: dict[str, Any] = {}

    def walk(tree: dict[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value

    walk(asdict(config), "")
    return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The nested form of what `flatten` returned."""
    tree: dict[str, Any] = {}
    for dotted, value in flat.items():
        *sections, leaf = dotted.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return tree


def _read_toml(path: Path) -> dict[str, Any]:
    import tomli

    try:
        return tomli.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        shipped = [p.name for p in Path(__file__).parent.glob("*.toml")]
        near = difflib.get_close_matches(path.name, shipped, n=1) or ["demo.toml"]
        raise ConfigError(f"{path}: no such file; did you mean configs/{near[0]}?") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except tomli.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _apply_override(tree: dict[str, Any], override: str, places: dict[str, str]) -> None:
    key, equals, text = override.removeprefix("--").partition("=")
    if not override.startswith("--") or not equals or "." not in key:
        raise ConfigError(f"{override}: an override has the form --section.key=value")
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{override}: {section} is a key, not a section")
        node = child
    node[leaf] = _parse_value(key, text)
    places[key] = override


def _parse_value(key: str, text: str) -> Any:
    import tomli

    if _type_of(key) is str:
        quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'"
        return text[1:-1] if quoted else text
    try:
        return tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return text  # a bare word: for a choice such as "bf16"; other types refuse it below


def _type_of(dotted: str) -> Any:
    """The annotated type at a dotted key, or None where there is no such key."""
    kind: Any = RunConfig
    for part in dotted.split("."):
        if not is_dataclass(kind):
            return None
        kind = get_type_hints(kind).get(part)
    return kind


def _build(
    kind: Any, tree: dict[str, Any], prefix: str, source: str, places: dict[str, str]
) -> Any:
    """Build dataclass `kind` from `tree`; `prefix` is its dotted key with a trailing dot."""
    hints = get_type_hints(kind)
    for key in tree:
        if key not in hints:
            below = [o for place, o in places.items() if f"{place}.".startswith(f"{prefix}{key}.")]
            where = below[0] if below else f"{source}: {prefix}{key}"
            raise ConfigError(f"{where}: unknown key; {_nearest(key, prefix, hints)}")
    values: dict[str, Any] = {}
    for spec in fields(kind):
        dotted = prefix + spec.name
        if spec.name in tree:
            place = places.get(dotted) or f"{source}: {dotted}"
            values[spec.name] = _convert(
                hints[spec.name], tree[spec.name], dotted, place, source, places
            )
        elif spec.default is MISSING and spec.default_factory is MISSING:
            what = "section" if is_dataclass(hints[spec.name]) else "key"
            raise ConfigError(f"{source}: {dotted}: this {what} is required")
    try:
        return kind(**values)
    except ConfigError as error:
        key = prefix + str(error).split(" ", 1)[0]
        place = f"{places[key]}: " if key in places else f"{source}: "
        raise ConfigError(f"{place}{prefix}{error}") from None


def _nearest(key: str, prefix: str, hints: dict[str, Any]) -> str:
    near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    for section, kind in get_type_hints(RunConfig).items():
        if is_dataclass(kind) and key in get_type_hints(kind):
            return f"did you mean {section}.{key}?"
    return f"known here: {', '.join(hints)}"


def _convert(
    kind: Any, value: Any, dotted: str, place: str, source: str, places: dict[str, str]
) -> Any:
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{place}: must be a section [{dotted}], not {value!r}")
        return _build(kind, value, dotted + ".", source, places)
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{place} = {value!r}: must be one of {', '.join(choices)}{hint}")
        return value
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if not isinstance(value, list | tuple):
            example = "integers such as [10, 20]" if item is int else f"{list(get_args(item))}"
            raise ConfigError(f"{place} = {value!r}: must be a list of {example}")
        return tuple(_convert(item, v, dotted, f"{place}: item", source, places) for v in value)
    if kind is float and type(value) is int:
        value = float(value)
    if kind is float and type(value) is float and not math.isfinite(value):
        raise ConfigError(f"{place} = {value}: must be a finite number")
    if type(value) is not kind:
        names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
        raise ConfigError(f"{place} = {value!r}: must be {names[kind]}")
    return value
