"""Keys of config.json that are missing or have a wrong type are handled as in transformers, or
refused.

The table of defaults is compared with the classes of the installed transformers. Then every key of
a config.json is left out, and set to invalid values, one at a time.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

from configs.errors import UserError
from models.hf.config.defaults import DEFAULTS, MODEL_TYPES, STRETCHED, UNUSED, OrNull
from models.hf.dense import dense_model
from models.hf.table import from_hf_config
from tests.models.hf.transformers_peer import (
    DENSE,
    SEVEN,
    follow_or_refuse,
    their_config,
    transformers,
)

Config = dict[str, Any]
NONSENSE: tuple[Any, ...] = (
    None, "1", "x" * 5000, True, False, -1, 0, 10**30, 1.5, float("nan"), [], ["x"], [True], {},
    {"a": [[[[[[1]]]]]]},
)  # fmt: skip
STRETCHABLE = ("qwen3", "deepseek-v3", "gpt-oss", "LlamaConfig")
BESIDE_THE_NETWORK = {*UNUSED, "initializer_range", "router_aux_loss_coef", "dtype"}
"""Configuration keys that logits do not depend on."""


@pytest.mark.parametrize("architecture", DEFAULTS)
def test_the_table_is_that_of_the_installed_classes(architecture: str) -> None:
    kind = transformers().CONFIG_MAPPING[MODEL_TYPES[architecture]]
    theirs = {field.name: field for field in fields(kind)}
    for key, ours in DEFAULTS[architecture].items():
        default = ours.default if isinstance(ours, OrNull) else ours
        if key == "rope_theta":
            assert kind.default_theta == default
        elif key == "partial_rotary_factor":
            assert kind().rope_parameters[key] == default
        else:
            assert theirs[key].default == default, key
            assert not isinstance(ours, OrNull) or type(None) in get_args(theirs[key].type), key
    made = kind().rope_parameters
    for key, value in STRETCHED.get(architecture, {"rope_type": "default"}).items():
        assert made[key] == value, key
    assert kind.model_type == MODEL_TYPES[architecture]


def test_types_of_keys_that_are_not_used() -> None:
    """Except null, no class accepts a type that we refuse."""
    for model_type in MODEL_TYPES.values():
        kind = transformers().CONFIG_MAPPING[model_type]
        for field in fields(kind):
            if field.name in UNUSED and not isinstance(field.type, str):
                allowed = get_args(field.type) or (field.type,)
                theirs = {get_origin(t) or t for t in allowed} - {type(None)}
                assert theirs <= {*UNUSED[field.name]}, (model_type, field.name)


def spots(raw: Config) -> Iterator[tuple[str, ...]]:
    """Every key, including those of nested objects."""
    for key, value in raw.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, inner) for inner in value)


def with_spot(raw: Config, spot: tuple[str, ...], value: Any, remove: bool = False) -> Config:
    changed = tree = copy.deepcopy(raw)
    for key in spot[:-1]:
        tree = tree[key]
    if remove:
        del tree[spot[-1]]
    else:
        tree[spot[-1]] = value
    return changed


def network(raw: Config) -> Config:
    """The settings of a configuration that affect the network."""
    return {k: v for k, v in their_config(raw).items() if k not in BESIDE_THE_NETWORK}


class Reading:
    """A folder's config.json as both readers read it, and changes of it."""

    def __init__(self, name: str, folder: Path, target: Path) -> None:
        self.folder, self.target = folder, target
        self.ours = dense_model if name in DENSE else from_hf_config
        self.raw: Config = json.loads((folder / "config.json").read_text())
        self.model, self.network = self.ours(self.raw, "config.json"), network(self.raw)

    def told(self, changed: Config) -> str:
        """Our error message; "" if both readers read the same network as before, or logits
        agree."""
        try:
            model = self.ours(changed, "config.json")
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 700, error
            return str(error)
        if model == self.model and network(changed) == self.network:
            return ""
        return follow_or_refuse(self.folder, changed, self.target)


@pytest.mark.parametrize("name", [*SEVEN, *DENSE])
def test_every_key_left_out(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    reading = Reading(name, folders[name], tmp_path / "hf")
    followed = 0
    for spot in spots(reading.raw):
        if spot != ("model_type",):  # transformers does not load a folder without it
            followed += reading.told(with_spot(reading.raw, spot, None, remove=True)) == ""
    assert followed > 10


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*SEVEN, *DENSE])
def test_every_key_with_a_wrong_type(
    name: str, every: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    """A wrong type is refused in a line that names file and key, or read as before. An integer is
    valid for a float, because JSON has one number type.

    every: every value of every key; otherwise a third of them, in turn, so that every three
    families that follow each other have every value of the keys at the same place."""
    reading = Reading(name, folders[name], tmp_path / "hf")
    for turn, spot in enumerate(spots(reading.raw), [*SEVEN, *DENSE].index(name)):
        given = reading.raw
        for key in spot:
            given = given[key]
        for value in NONSENSE if every else NONSENSE[turn % 3 :: 3]:
            if type(value) is type(given) or (type(value) is int and type(given) is float):
                continue
            told = reading.told(with_spot(reading.raw, spot, value))
            named = "config.json" in told and spot[-1] in told
            # null can be a valid value, which then contradicts the tensors
            contradicted = "has shape" in told or "tensors missing" in told
            assert not told or named or contradicted, (spot, value, told)


@pytest.mark.parametrize("both", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", STRETCHABLE)
def test_every_key_of_a_stretch_with_a_wrong_type(
    name: str, both: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    """both: every value of every key in both places; otherwise a quarter of them, in turn, so that
    each value of each key is in each place once, in one of the families."""
    stretch = {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16,
        "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "mscale": 0.0,
        "mscale_all_dim": 0.0, "rope_theta": 3e4, "attention_factor": None,
    }  # fmt: skip
    reading = Reading(name, folders[name], tmp_path / "hf")
    family = STRETCHABLE.index(name)
    for place, source in enumerate(("rope_parameters", "rope_scaling")):
        for turn, key in enumerate(stretch, place + family):
            for value in NONSENSE if both else NONSENSE[turn % 4 :: 4]:
                changed = {k: v for k, v in reading.raw.items() if not k.startswith("rope_")}
                told = reading.told(changed | {source: stretch | {key: value}})
                assert not told or (key in told and "config.json" in told), (key, value, told)
