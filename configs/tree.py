"""Convert a tree of values to a `JobConfig`: checks names, types and ranges of types.

Every message begins with the origin of the value: the file and the key, or the override.
"""

import difflib
import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from configs.errors import ConfigError, shortened
from configs.rules import shown
from configs.schema import JobConfig

_LONGEST_STRING = 4096
"""Characters: longer than any path on Linux."""
_BARE = re.compile(r"[A-Za-z0-9_-]{1,60}")
_hints_of = functools.cache(get_type_hints)
"""Types of the fields of a dataclass by name; evaluating them took half of the time of loading."""


def build_section(kind: Any, tree: dict[str, Any], source: str) -> Any:
    """The dataclass `kind`, of the same form as a section of the schema, from a tree of values.

    source: origin of the tree for error messages. Raises ConfigError.
    """
    return _Builder(shortened(source, 200), {}, kind).section(kind, tree, "")


def build(tree: dict[str, Any], source: str, places: Mapping[str, str]) -> JobConfig:
    """The config of a tree.

    source: origin of the tree for error messages. places: keys (or sections) that an override set,
    with that override. Raises ConfigError.
    """
    config: JobConfig = _Builder(shortened(source, 200), places).section(JobConfig, tree, "")
    return config


def nearest(key: str, prefix: str, hints: Mapping[str, Any], root: Any = JobConfig) -> str:
    """A suggestion for an unknown key of the section `prefix`, also from other sections of
    `root`."""
    near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5) if len(key) < 100 else []
    if near:
        return f"did you mean {prefix}{near[0]}?"
    elsewhere = [dotted for dotted in _all_keys(root, "") if dotted.endswith(f".{key}")]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"known here: {', '.join(hints)}"


def _all_keys(kind: Any, prefix: str) -> Iterator[str]:
    for name, hint in _hints_of(kind).items():
        yield prefix + name
        if is_dataclass(hint):
            yield from _all_keys(hint, f"{prefix}{name}.")


@dataclass(frozen=True)
class _Builder:
    source: str
    places: Mapping[str, str]
    root: Any = JobConfig

    def section(self, kind: Any, tree: dict[str, Any], prefix: str) -> Any:
        """Build dataclass `kind` from `tree`; prefix: its dotted key with a trailing dot."""
        hints = _hints_of(kind)
        for key in tree:
            if key not in hints:
                name = key if _BARE.fullmatch(key) else shown(key)
                where = self._place(prefix + name)
                raise ConfigError(f"{where}: unknown key; {nearest(key, prefix, hints, self.root)}")
        values: dict[str, Any] = {}
        for spec in fields(kind):
            dotted = prefix + spec.name
            if spec.name in tree:
                place = self._place(dotted)
                values[spec.name] = self._convert(hints[spec.name], tree[spec.name], dotted, place)
            elif spec.default is MISSING and spec.default_factory is MISSING:
                what = "section" if is_dataclass(hints[spec.name]) else "key"
                raise ConfigError(f"{self.source}: {dotted}: this {what} is required")
        try:
            return kind(**values)
        except ConfigError as error:
            key = prefix + re.split(r"[ :,]", str(error), maxsplit=1)[0]
            given = self._override(key)
            raise ConfigError(f"{given or self.source}: {prefix}{error}") from None

    def _override(self, dotted: str) -> str | None:
        """The override that set a key or a section that contains it."""
        found = [known for known in self.places if f"{dotted}.".startswith(f"{known}.")]
        return self.places[max(found, key=len)] if found else None

    def _place(self, dotted: str) -> str:
        given = self._override(dotted)
        if given is None:
            return f"{self.source}: {dotted}"
        return given if dotted in self.places else f"{given}: {dotted}"

    def _convert(self, kind: Any, value: Any, dotted: str, place: str) -> Any:
        if is_dataclass(kind):
            if not isinstance(value, dict):
                raise ConfigError(f"{place}: must be a section [{dotted}], not {shown(value)}")
            return self.section(kind, value, dotted + ".")
        if get_origin(kind) is Literal:
            return _choice(get_args(kind), value, place)
        if get_origin(kind) is tuple:
            item = get_args(kind)[0]
            if not isinstance(value, list | tuple):
                example = _LISTS.get(item) or _example(item)
                raise ConfigError(f"{place} = {shown(value)}: must be a list of {example}")
            if is_dataclass(item):
                return tuple(
                    self._table(item, table, dotted, place, n) for n, table in enumerate(value, 1)
                )
            return tuple(self._convert(item, v, dotted, f"{place}: item") for v in value)
        return _scalar(kind, value, place)

    def _table(self, kind: Any, value: Any, dotted: str, place: str, number: int) -> Any:
        """One table of a list of tables; number: which, from 1, for errors."""
        if not isinstance(value, dict):
            raise ConfigError(f"{place}: item {number} = {shown(value)}: must be a table")
        try:
            return self.section(kind, value, f"{dotted}.")
        except ConfigError as error:
            raise ConfigError(f"{error} (table {number} of {dotted})") from None


def _example(item: Any) -> str:
    if is_dataclass(item):
        required = [spec.name for spec in fields(item) if spec.default is MISSING]
        return f"tables with the keys {' and '.join(required)}"
    return str(list(get_args(item)))


_LISTS = {int: "integers such as [10, 20]", str: 'strings such as ["a", "b"]'}
_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def _choice(choices: tuple[str, ...], value: Any, place: str) -> Any:
    if isinstance(value, str) and value in choices:
        return value
    near = difflib.get_close_matches(value[:100], choices, n=1) if isinstance(value, str) else []
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{place} = {shown(value)}: must be one of {', '.join(choices)}{hint}")


def _scalar(kind: type, value: Any, place: str) -> Any:
    if type(value) is int and kind in (int, float) and not -(2**63) <= value < 2**63:
        more = "; write it with an exponent, as in 1e30" if kind is float else ""
        raise ConfigError(f"{place} = {shown(value)}: an integer has at most 64 bits{more}")
    if kind is float and type(value) is int:
        value = float(value)
    if kind is float and type(value) is float and not math.isfinite(value):
        raise ConfigError(f"{place} = {value}: must be a finite number")
    if type(value) is not kind:
        raise ConfigError(f"{place} = {shown(value)}: must be {_NAMES[kind]}")
    if isinstance(value, str):
        _check_string(value, place)
    return value


def _check_string(value: str, place: str) -> None:
    problem = ""
    if len(value) > _LONGEST_STRING:
        problem = f"longer than {_LONGEST_STRING} characters"
    elif "\0" in value:
        problem = "holds a NUL character, which no name can"
    else:
        try:
            value.encode()
        except UnicodeEncodeError:
            problem = "not Unicode text; use a name that UTF-8 can spell"
    if problem:
        raise ConfigError(f"{place} = {shown(value)}: {problem}")
