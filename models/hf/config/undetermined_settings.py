"""Settings that the keys of a Hugging Face architecture do not determine, stored under our own key.

The computation of the weights is defined by the architecture's keys alone, as any reader
interprets them. A model also has settings of training (the step of the balancing bias), spellings
of one meaning (`n_kv_heads` 0) and settings without effect in this model. So that an import
returns exactly the exported model, these are stored in `config.json` under `KEY`, by their dotted
names; readers ignore an unknown key.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, is_dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from configs.errors import UserError
from configs.model import ModelConfig

KEY = "phalanx_model"


def undetermined_settings(model: ModelConfig, as_read: ModelConfig) -> dict[str, Any]:
    """Settings of `model` that would have another value if read from the same keys without
    `KEY`."""
    ours, theirs = _flat(asdict(model)), _flat(asdict(as_read))
    return {key: value for key, value in ours.items() if value != theirs[key]}


def with_undetermined_settings(
    model: ModelConfig,
    config: dict[str, Any],
    place: str,
    is_equivalent: Callable[[ModelConfig], bool],
) -> ModelConfig:
    """`model` with the settings in `config[KEY]`.

    is_equivalent: whether the architecture's own keys are the same for another model as for
    `model`. Raises UserError if they are not: `config[KEY]` must not change what those keys
    determine. Settings of RoPE are then ignored instead: its keys are edited by hand (YaRN for
    longer contexts, as model cards recommend), and then determine what the exported model left
    open.
    """
    given = config.get(KEY)
    if given is None:
        return model
    if not isinstance(given, dict):
        raise UserError(f"{place}: {KEY}: must be an object")
    sections: dict[str, dict[str, Any]] = {}
    for key, value in given.items():
        section, _, leaf = key.rpartition(".")
        value = _checked(model, section, leaf, value, f"{place}: {KEY}: {key[:80]!r}")
        sections.setdefault(section, {})[leaf] = value
    rope = sections.pop("rope", {})
    changed = _replaced(model, sections, place)
    if is_equivalent(with_rope := _replaced(changed, {"rope": rope}, place)):
        return with_rope
    if not is_equivalent(changed):
        raise UserError(
            f"{place}: {KEY}: contradicts the other keys, and may only set what they leave open"
        )
    return changed


def _replaced(model: ModelConfig, sections: dict[str, dict[str, Any]], place: str) -> ModelConfig:
    try:
        parts = {s: replace(getattr(model, s), **new) for s, new in sections.items() if s}
        return replace(model, **sections.get("", {}), **parts)
    except UserError as error:
        raise UserError(f"{place}: {KEY}: {error}") from None


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _checked(model: ModelConfig, section: str, leaf: str, value: Any, where: str) -> Any:
    """A value for the key `leaf` of a section of `model`, of the key's type."""
    part = getattr(model, section, None) if section else model
    kind = get_type_hints(type(part)).get(leaf) if is_dataclass(part) else None
    if kind is None or is_dataclass(kind):
        raise UserError(f"{where}: no such setting of a model")
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    fits = value in get_args(kind) if get_origin(kind) is Literal else type(value) is kind
    if not fits or (kind is float and not math.isfinite(value)):
        raise UserError(f"{where}: has a value that the setting cannot have")
    return value
