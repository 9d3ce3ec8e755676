"""Values of an untrusted config.json, checked before memory of their size is allocated."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import UserError
from configs.model import ModelConfig
from models.hf.config.defaults import DEFAULTS, OrNull
from models.hf.messages import shown
from models.hf.tensors import HfTensor, Layout


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture and the settings of ours that it can express."""

    architecture: str
    refusals: Callable[[ModelConfig], list[str]]
    """Settings of a model that the architecture cannot express; empty if it can express all."""
    config: Callable[[ModelConfig], dict[str, Any]]
    """The keys of config.json that only this family has."""
    parse: Callable[["HFConfigReader"], ModelConfig]
    """The model of a config.json."""
    layer: Callable[[ModelConfig, int, Layout], Iterator[HfTensor]]
    """The tensors of a layer, its routed experts in the given layout."""
    layout: Layout
    """The layout of the family's published checkpoints, which exports have."""
    has_mtp: bool = False
    """Whether the checkpoints may contain MTP modules, as layers beyond the last."""
    unloadable: Callable[[ModelConfig], list[str]] = lambda model: []
    """Sizes of a model that the architecture's code in transformers does not support, with the
    required values, although the architecture expresses the features."""


@dataclass(frozen=True)
class HFConfigReader:
    """A config.json and its name in error messages.

    A missing key has transformers' default if the architecture has one; null is an ordinary value,
    and an error if the architecture defines no meaning for it.
    """

    raw: dict[str, Any]
    place: str
    architecture: str
    """The row of `models.hf.config.defaults.DEFAULTS`."""

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Values of keys that are missing."""
        return DEFAULTS.get(self.architecture, {})

    def get(self, key: str) -> Any:
        """`raw[key]` or its default, of any type; None if there is neither."""
        if key in self.raw:
            return self.raw[key]
        default = self.defaults.get(key)
        return default.default if isinstance(default, OrNull) else default

    def integer(self, key: str, *also: str, low: int = 1, high: int = 2**24) -> int:
        """`raw[key]`, an integer in [low, high].

        also: other spellings of the key; all that are present must agree.
        """
        given = [k for k in (key, *also) if k in self.raw]
        values = {k: self._number(self.raw, k, int, low, high) for k in given}
        self.agree(values)
        if values:
            return int(values[given[0]])
        return int(self._number({key: self.get(key)}, key, int, low, high))

    def integer_or_none(self, key: str, low: int = 1, high: int = 2**24) -> int | None:
        """`raw[key]`; None if it is null or missing and the architecture derives it."""
        if key in self.raw and (self.raw[key] is not None or not self._may_be_null(key)):
            return int(self._number(self.raw, key, int, low, high, null=True))
        value = None if key in self.raw else self.get(key)
        return None if value is None else int(value)

    def number(self, key: str, low: float = 0.0, high: float = 1e12) -> float:
        """`raw[key]`, a number in [low, high]."""
        return float(self._number({key: self.get(key)}, key, float, low, high))

    def coefficient(self, key: str) -> float:
        """`raw[key]`, the factor of an auxiliary loss; 0 if the architecture has none."""
        return 0.0 if self.get(key) is None and key not in self.raw else self.number(key, high=100)

    def flag(self, key: str) -> bool:
        """`raw[key]`, true or false."""
        value = self.get(key)
        if type(value) is not bool:
            raise UserError(f"{self.place}: {key} = {shown(value)}: must be true or false")
        return value

    def listed(self, key: str, kind: type) -> list[Any] | None:
        """`raw[key]`, a list of `kind`; None if it is null or missing."""
        value = self.get(key)
        if value is None and (key not in self.raw or self._may_be_null(key)):
            return None
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            wanted = f"a list of {'integers' if kind is int else 'strings'}"
            raise UserError(f"{self.place}: {key} = {shown(value)}: must be {wanted}")
        return value

    def refuse(self, key: str, *allowed: Any) -> None:
        """Raise UserError if `key`, or its default, is none of the supported values."""
        if key not in self.raw and key not in self.defaults:
            return
        value = self.get(key)
        if not any(type(value) is type(a) and value == a for a in allowed):
            only = " or ".join(map(repr, allowed))
            left_out = "" if key in self.raw else " (its default, for it is left out)"
            raise UserError(
                f"{self.place}: {key} = {shown(value)}{left_out}: only {only} is supported"
            )

    def agree(self, values: Mapping[str, Any]) -> None:
        """Raise UserError if different spellings of one key have different values."""
        if any(value != other for value in values.values() for other in values.values()):
            pairs = " and ".join(f"{key} = {shown(value)}" for key, value in values.items())
            raise UserError(f"{self.place}: {pairs}: two spellings of one key must agree")

    def _may_be_null(self, key: str) -> bool:
        return isinstance(self.defaults.get(key), OrNull)

    def _number(
        self,
        tree: Mapping[str, Any],
        key: str,
        kind: type,
        low: float,
        high: float,
        null: bool = False,
    ) -> Any:
        value = tree.get(key)
        if value is None and not null and key not in self.raw:
            raise UserError(f"{self.place}: key {key!r} is missing")
        return number_of(value, f"{self.place}: {key}", kind, low, high)


def number_of(value: Any, place: str, kind: type, low: float, high: float) -> Any:
    """`value`, an int or (kind float) any number in [low, high]; place: file and key."""
    if type(value) is not int and not (kind is float and type(value) is float):
        wanted = "an integer" if kind is int else "a number"
        raise UserError(f"{place} = {shown(value)}: wrong type, must be {wanted}")
    if not low <= value <= high:
        raise UserError(f"{place} = {shown(value)}: must lie between {low} and {high}")
    return kind(value)


def clashes(**settings: bool) -> list[str]:
    """The names, with dots for double underscores, of the settings that are true."""
    return [name.replace("__", ".") for name, wrong in settings.items() if wrong]


def plain_gqa_clashes(model: ModelConfig) -> list[str]:
    """Settings that Qwen3, GLM-4 and Mixtral all lack."""
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


def plain_softmax_clashes(model: ModelConfig) -> list[str]:
    """Router settings that Qwen3, Mixtral and GPT-OSS all lack."""
    moe = model.moe
    return clashes(
        moe__score_func=moe.score_func != "softmax",
        moe__n_groups=moe.n_groups > 1,
        moe__bias_update_rate=moe.bias_update_rate > 0,
        moe__n_shared_experts=moe.n_shared_experts > 0,
        moe__route_scale=moe.route_scale != 1.0,
    )
