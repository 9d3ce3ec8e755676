"""Values of an untrusted config.json, checked before anything of their size is made."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from configs.model import Model, Rope
from configs.rules import ConfigError
from models.hf.tensors import HfTensor, Layout


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture and what of ours it can express."""

    architecture: str
    refusals: Callable[[Model], list[str]]
    """Settings of a model that the architecture cannot express; empty: it can."""
    config: Callable[[Model], dict[str, Any]]
    """The keys of config.json that are this family's own."""
    parse: Callable[["Values"], Model]
    """The model of a config.json."""
    layer: Callable[[Model, int, Layout], Iterator[HfTensor]]
    """The tensors of a layer, its routed experts in the given layout."""
    layout: Layout
    """The layout of the family's published checkpoints: what an export has."""
    has_mtp: bool = False
    """Whether the checkpoints may hold MTP modules, as layers beyond the last."""


@dataclass(frozen=True)
class Values:
    """A config.json and the name that errors call it by."""

    raw: dict[str, Any]
    place: str

    def integer(
        self, key: str, *also: str, low: int = 1, high: int = 2**24, default: int | None = None
    ) -> int:
        """`raw[key]`, an integer in [low, high].

        also: other spellings of the key; all that are given must agree. default: for a key that is
        missing or null, where the architecture has one.
        """
        given = [k for k in (key, *also) if self.raw.get(k) is not None]
        values = {k: self._number(self.raw, k, int, low, high) for k in given}
        if len(set(values.values())) > 1:
            pairs = " and ".join(f"{k} = {value}" for k, value in values.items())
            raise ConfigError(f"{self.place}: {pairs}: two spellings of one key must agree")
        if not given and default is not None:
            return default
        return int(self._number(self.raw, given[0] if given else key, int, low, high))

    def number(
        self, key: str, low: float = 0.0, high: float = 1e12, default: float | None = None
    ) -> float:
        """`raw[key]`, a number in [low, high]; `default` where it is missing or null."""
        if self.raw.get(key) is None and default is not None:
            return default
        return float(self._number(self.raw, key, float, low, high))

    def coefficient(self, key: str) -> float:
        """`raw[key]`, the factor of an auxiliary loss; 0 where it is not given."""
        return self.number(key, high=100.0, default=0.0)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """`raw[key]`, true or false; `default` where it is missing or null."""
        if self.raw.get(key) is None and default is not None:
            return default
        if type(self.raw.get(key)) is not bool:
            raise ConfigError(f"{self.place}: {key} = {self.raw.get(key)!r}: must be true or false")
        return bool(self.raw[key])

    def refuse(self, key: str, *allowed: Any) -> None:
        """Raise ConfigError where `key` is given and is none of the values that are supported."""
        if key in self.raw and self.raw[key] not in allowed:
            only = " or ".join(map(repr, allowed))
            raise ConfigError(f"{self.place}: {key} = {self.raw[key]!r}: only {only} is supported")

    def rope(self, interleaved: bool) -> Rope:
        """The RoPE of `rope_parameters`, or of the older `rope_theta` and `rope_scaling`."""
        source = "rope_parameters" if self.raw.get("rope_parameters") else "rope_scaling"
        given = self.raw.get(source) or {}
        if not isinstance(given, dict):
            raise ConfigError(f"{self.place}: {source} = {given!r}: must be an object")
        older = {k: self.raw[k] for k in _OLDER_ROPE_KEYS if self.raw.get(k) is not None}
        for key in older.keys() & given.keys():
            if older[key] != given[key]:
                raise ConfigError(
                    f"{self.place}: {key} = {older[key]!r}, but {source}.{key} = {given[key]!r}"
                )
        merged: dict[str, Any] = older | given
        kind = merged.get("rope_type", merged.get("type", "default"))
        if kind not in ("default", "yarn", "llama3"):
            raise ConfigError(
                f"{self.place}: {source}: rope_type = {kind!r}: must be default, yarn or llama3"
            )
        known = {"rope_type", "type", "truncate", *_OLDER_ROPE_KEYS, *_SCALING_KEYS}
        unknown = sorted(k for k in given if k not in known and given[k] is not None)
        if unknown:  # left out, it would change what the weights compute
            raise ConfigError(f"{self.place}: {source}.{unknown[0]}: this key is not supported")
        if merged.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(
                f"{self.place}: partial_rotary_factor = {merged['partial_rotary_factor']!r}: "
                "only 1.0 is supported"
            )
        scaled: dict[str, Any] = {}
        if kind != "default":
            for key, ours, default in _SCALING[kind]:
                if key in merged or default is None:
                    low = 1 if ours in ("factor", "original_length") else 0
                    scaled[ours] = self._number(merged, key, float, low, 2**31)
            scaled |= {"scaling": kind, "original_length": int(scaled["original_length"])}
            if kind == "yarn":
                scaled["truncate"] = bool(merged.get("truncate", True))
        theta = self._number(merged, "rope_theta", float, 1, 1e12)
        return Rope(theta=theta, interleaved=interleaved, **scaled)

    def _number(self, tree: dict[str, Any], key: str, kind: type, low: float, high: float) -> Any:
        if tree.get(key) is None:
            raise ConfigError(f"{self.place}: key {key!r} is missing")
        value = tree[key]
        if type(value) is not int and not (kind is float and type(value) is float):
            wanted = "an integer" if kind is int else "a number"
            raise ConfigError(f"{self.place}: {key} = {value!r}: wrong type, must be {wanted}")
        if not low <= value <= high:
            raise ConfigError(f"{self.place}: {key} = {value!r}: must lie between {low} and {high}")
        return kind(value)


_OLDER_ROPE_KEYS = ("rope_theta", "partial_rotary_factor")
_SCALING: dict[str, list[tuple[str, str, float | None]]] = {
    "yarn": [
        ("factor", "factor", None),
        ("original_max_position_embeddings", "original_length", None),
        ("beta_fast", "beta_fast", 32.0),
        ("beta_slow", "beta_slow", 1.0),
        ("mscale", "mscale", 0.0),
        ("mscale_all_dim", "mscale_all_dim", 0.0),
    ],
    "llama3": [
        ("factor", "factor", None),
        ("original_max_position_embeddings", "original_length", None),
        ("low_freq_factor", "low_freq_factor", 1.0),
        ("high_freq_factor", "high_freq_factor", 4.0),
    ],
}
"""(their key, ours, default; None: required)."""
_SCALING_KEYS = {theirs for rows in _SCALING.values() for theirs, _, _ in rows}


def rope_parameters(rope: Rope) -> dict[str, Any]:
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


def clashes(**settings: bool) -> list[str]:
    """The names, with dots for double underscores, of the settings that are true."""
    return [name.replace("__", ".") for name, wrong in settings.items() if wrong]


def plain_gqa_clashes(model: Model) -> list[str]:
    """What Qwen3, GLM-4 and Mixtral all lack."""
    a, moe, rope = model.attention, model.moe, model.rope
    return clashes(
        attention__kind=a.kind != "gqa",
        attention__bias=a.bias,
        attention__sinks=a.sinks,
        attention__local=a.local != "none",
        attention__rope_on_full=not a.rope_on_full,
        attention__temperature_floor=a.temperature_floor > 0,
        rope__interleaved=rope.interleaved,
        rope__mscale=bool(rope.mscale or rope.mscale_all_dim),
        moe_every=model.moe_every > 1,
        moe__router_bias=moe.router_bias,
        moe__expert_bias=moe.expert_bias,
        moe__activation=moe.activation != "swiglu",
        moe__weight_on=moe.weight_on != "output",
    )


def plain_softmax_clashes(model: Model) -> list[str]:
    """What the routers of Qwen3, Mixtral and GPT-OSS all lack."""
    moe = model.moe
    return clashes(
        moe__score_func=moe.score_func != "softmax",
        moe__n_groups=moe.n_groups > 1,
        moe__bias_update_rate=moe.bias_update_rate > 0,
        moe__n_shared_experts=moe.n_shared_experts > 0,
        moe__route_scale=moe.route_scale != 1.0,
    )
