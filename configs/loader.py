"""Load a TOML file and `--section.key=value` overrides as one frozen `JobConfig`, and write it
back.

Loading is strict: an unknown key is reported with its nearest neighbor, a wrong type with the
expected one, and every message begins with the origin of the value (the file or the override).
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.paths import check_folder, is_url
from configs.rules import shown
from configs.schema import JobConfig
from configs.tree import build
from configs.values import apply_override, read_toml

_MOST_RANKS = 2**20


def load(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read an experiment.

    Args:
        path: The TOML file.
        overrides: `--section.key=value`, the value in TOML syntax (strings also without quotes).

    Raises ConfigError: one line with place and remedy.
    """
    config = from_dict(read_toml(Path(path)), str(path), overrides)
    check_folders(config)
    return config


def check_folders(config: JobConfig) -> None:
    """Raise ConfigError for a folder that a run could never write to."""
    check_folder("run.dir", config.run.dir)
    check_folder("data.cache_dir", config.data.cache_dir)
    if config.checkpoint.dir and not is_url(config.checkpoint.dir):
        check_folder("checkpoint.dir", config.checkpoint.dir)


def parse_arguments(arguments: Sequence[str]) -> tuple[str, list[str], int | None]:
    """The experiment file, the overrides and the value of `--ranks` (N or =N) of a command line."""
    files, overrides, ranks = [], [], None
    rest = iter(arguments)
    for argument in rest:
        name, _, value = argument.partition("=")
        if name == "--ranks":
            value = value or next(rest, "")
            digits = value.isascii() and value.isdigit() and len(value) < 10
            if not digits or not 1 <= int(value) <= _MOST_RANKS:
                given = shown(value)[1:-1]
                raise ConfigError(
                    f"--ranks {given}: must be a positive integer, at most {_MOST_RANKS}"
                )
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


def from_dict(tree: dict[str, Any], place: str, overrides: Sequence[str] = ()) -> JobConfig:
    """Build the config from `tree`, the result of `asdict`, changed by overrides as in `load`.

    place: the origin that an error message quotes.
    """
    places: dict[str, str] = {}
    for override in overrides:
        apply_override(tree, override, places)
    return build(tree, place, places)


def to_toml(config: JobConfig) -> str:
    """The complete experiment as TOML, defaults included; `load` reads it back unchanged."""
    import tomli_w

    return tomli_w.dumps(asdict(config))


def flatten(config: JobConfig) -> dict[str, Any]:
    """Every setting by its dotted key, as `{"train.steps": 100, ...}`; JSON types only.
    A list of tables, such as `data.blend`, is one setting."""
    flat: dict[str, Any] = {}

    def walk(tree: dict[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = _with_lists(value)

    walk(asdict(config), "")
    return flat


def _with_lists(value: Any) -> Any:
    """The value with a list in place of each tuple, also within tables."""
    if isinstance(value, dict):
        return {key: _with_lists(item) for key, item in value.items()}
    return [_with_lists(item) for item in value] if isinstance(value, tuple) else value


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The nested form of the result of `flatten`."""
    tree: dict[str, Any] = {}
    for dotted, value in flat.items():
        *sections, leaf = dotted.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return tree
