"""Values of an untrusted config.json, checked before anything of their size is made."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from configs.model import Model, Rope
from configs.rules import ConfigError


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
    layer: Callable[[Model, int], Any]
    """The tensors of a layer."""


@dataclass(frozen=True)
class Values:
    """A config.json and the name that errors call it by."""

    raw: dict[str, Any]
    place: str

    def integer(self, key: str, low: int = 1, high: int = 2**24) -> int:
        """`raw[key]`, an integer in [low, high]."""
        return int(self._number(self.raw, key, int, low, high))

    def number(self, key: str, low: float = 0.0, high: float = 1e12) -> float:
        """`raw[key]`, a number in [low, high]."""
        return float(self._number(self.raw, key, float, low, high))

    def flag(self, key: str) -> bool:
        """`raw[key]`, true or false."""
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
        given = self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {}
        if not isinstance(given, dict):
            raise ConfigError(f"{self.place}: rope_parameters = {given!r}: must be an object")
        older = {key: self.raw[key] for key in _OLDER_ROPE_KEYS if key in self.raw}
        merged: dict[str, Any] = older | given
        kind = merged.get("rope_type", merged.get("type", "default"))
        if kind not in ("default", "yarn", "llama3"):
            raise ConfigError(
                f"{self.place}: rope_type = {kind!r}: must be default, yarn or llama3"
            )
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
