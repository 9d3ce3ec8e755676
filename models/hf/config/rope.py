"""RoPE in config.json, in keys of three generations that transformers reads together.

`rope_parameters` (transformers 5) contains everything. Before, `rope_scaling` contained the
scaling, and `rope_theta` and `partial_rotary_factor` were next to it; `type` was `rope_type`. Model
cards still recommend adding a `rope_scaling`. transformers then replaces the whole
`rope_parameters` by it, so other keys in `rope_parameters` are lost. The same is done here if there
is only one interpretation of the two; otherwise the error names both.
"""

from typing import Any

from configs.errors import UserError
from configs.model import RopeConfig
from models.hf.config.config_reader import HFConfigReader, number_of
from models.hf.config.defaults import STRETCHED
from models.hf.messages import shown

_BESIDE = ("rope_theta", "partial_rotary_factor")
"""Keys that are in `rope_parameters`, or next to it in older files."""
_ORIGINAL = "original_max_position_embeddings"
_SCALING: dict[str, list[tuple[str, str, float | None]]] = {
    "yarn": [
        ("factor", "factor", None),
        (_ORIGINAL, "original_length", None),
        ("beta_fast", "beta_fast", 32.0),
        ("beta_slow", "beta_slow", 1.0),
        ("mscale", "mscale", 0.0),
        ("mscale_all_dim", "mscale_all_dim", 0.0),
    ],
    "llama3": [
        ("factor", "factor", None),
        (_ORIGINAL, "original_length", None),
        ("low_freq_factor", "low_freq_factor", None),
        ("high_freq_factor", "high_freq_factor", None),
    ],
}
"""(their key, ours, default; None: required). transformers treats 0 as "not given" if there is a
default."""
_KNOWN = {"rope_type", "type", "truncate", *_BESIDE} | {
    theirs for rows in _SCALING.values() for theirs, _, _ in rows
}


def rope_of(values: HFConfigReader, interleaved: bool) -> RopeConfig:
    """The RoPE that transformers derives from a config.json. Raises UserError if ours cannot
    express it, or if two keys contradict each other."""
    new, old = (_object(values, key) for key in ("rope_parameters", "rope_scaling"))
    if new is None and not old:
        new = STRETCHED.get(values.architecture, {})
    if not old:
        return _parse(values, "rope_parameters", new or {}, interleaved)
    rope = _parse(values, "rope_scaling", old, interleaved)
    if new:
        replaced = _parse(values, "rope_parameters", new, interleaved)
        plain = RopeConfig(theta=rope.theta, interleaved=interleaved)  # scaled by rope_scaling
        if replaced not in (rope, plain):
            raise UserError(
                f"{values.place}: rope_parameters = {shown(new)}, but rope_scaling = {shown(old)} "
                f"(rope_theta {rope.theta}) takes its place: make them agree, or remove one"
            )
    return rope


def _object(values: HFConfigReader, key: str) -> dict[str, Any] | None:
    given = values.raw.get(key)
    if given is not None and not isinstance(given, dict):
        raise UserError(f"{values.place}: {key} = {shown(given)}: must be an object")
    return given


def _parse(
    values: HFConfigReader, source: str, given: dict[str, Any], interleaved: bool
) -> RopeConfig:
    place = f"{values.place}: {source}"
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "yarn", "llama3"):
        raise UserError(f"{place}: rope_type = {shown(kind)}: must be default, yarn or llama3")
    if given.get("type", kind) != kind:
        raise UserError(f"{place}: rope_type = {shown(kind)}, but type = {shown(given['type'])}")
    unknown = sorted(k for k in given if k not in _KNOWN and given[k] is not None)
    if unknown:  # ignoring it would change the results
        raise UserError(f"{place}.{shown(unknown[0])[1:-1]}: this key is not supported")
    beside = {key: _beside(values, source, given, key) for key in _BESIDE}
    rotated = beside["partial_rotary_factor"]
    if (
        rotated is not None
        and number_of(rotated, f"{place}: partial_rotary_factor", float, 0, 1) != 1
    ):
        raise UserError(f"{place}: partial_rotary_factor = {shown(rotated)}: only 1.0 is supported")
    theta = number_of(beside["rope_theta"], f"{place}: rope_theta", float, 1, 1e12)
    scaled = {} if kind == "default" else _scaled(values, source, given, kind)
    return RopeConfig(theta=theta, interleaved=interleaved, **scaled)


def _beside(values: HFConfigReader, source: str, given: dict[str, Any], key: str) -> Any:
    """The key in `rope_parameters` or `rope_scaling`, else next to them, else its default."""
    inner, outer = given.get(key), values.raw.get(key)
    if key in given and inner is None:
        raise UserError(f"{values.place}: {source}.{key} = None: must be a number")
    if inner is not None and outer is not None and inner != outer:
        raise UserError(
            f"{values.place}: {key} = {shown(outer)}, but {source}.{key} = {shown(inner)}"
        )
    return values.get(key) if inner is None else inner


def _scaled(
    values: HFConfigReader, source: str, given: dict[str, Any], kind: str
) -> dict[str, Any]:
    place = f"{values.place}: {source}"
    scaled: dict[str, Any] = {"scaling": kind}
    for key, ours, default in _SCALING[kind]:
        value = _original(values, source, given) if key == _ORIGINAL else given.get(key)
        if default is not None and value is None:
            value = default
        low = 1 if key in ("factor", _ORIGINAL) else 1e-6 if kind == "llama3" else 0
        if value is None and key not in given:
            raise UserError(f"{place}: key {key!r} is missing")
        number = number_of(value, f"{place}: {key}", float, low, 2**31)
        scaled[ours] = number or default or 0.0
    length = scaled["original_length"]
    if length != int(length):
        raise UserError(f"{place}: {_ORIGINAL} = {length}: must be an integer")
    scaled["original_length"] = int(length)
    if kind == "yarn":
        truncate = given.get("truncate", True)
        if type(truncate) is not bool:
            raise UserError(f"{place}: truncate = {shown(truncate)}: must be true or false")
        scaled["truncate"] = truncate
    return scaled


def _original(values: HFConfigReader, source: str, given: dict[str, Any]) -> Any:
    """The length before scaling: transformers first reads the key next to `rope_parameters`, and
    uses the longest sequence if there is no key."""
    both = {
        name: tree[_ORIGINAL]
        for name, tree in ((_ORIGINAL, values.raw), (f"{source}.{_ORIGINAL}", given))
        if _ORIGINAL in tree
    }
    values.agree(both)
    return next(iter(both.values())) if both else values.get("max_position_embeddings")


def rope_parameters(rope: RopeConfig) -> dict[str, Any]:
    """`rope_parameters` for config.json."""
    if rope.scaling == "none":
        return {"rope_type": "default", "rope_theta": rope.theta}
    keys: dict[str, Any] = {"rope_type": rope.scaling, "rope_theta": rope.theta}
    for theirs, ours, default in _SCALING[rope.scaling]:
        value = getattr(rope, ours)
        if value != default or ours not in ("mscale", "mscale_all_dim"):
            keys[theirs] = value
    if rope.scaling == "yarn":
        keys["truncate"] = rope.truncate
    return keys
