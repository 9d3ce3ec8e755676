"""The table of parameters (`models.parameters`): every parameter is declared, and no other name."""

import re

import pytest
import torch
from torch import nn

from configs.model import ModelConfig
from configs.schema import OptimizerConfig
from models.decoder import Decoder
from models.init import initialize
from models.parameters import PARAMETERS, ParamSpec, spec_of
from tests.models.families import FAMILIES, GLM4
from train.optim.optimizer import build_optimizer


def shapes() -> dict[str, set[torch.Size]]:
    """The entry of every parameter of every family, by the last two parts of its name."""
    found: dict[str, set[torch.Size]] = {}
    for config in FAMILIES.values():
        with torch.device("meta"):
            model = Decoder(config)
        for name, parameter in model.named_parameters():
            found.setdefault(".".join(name.split(".")[-2:]), set()).add(parameter.shape)
            assert spec_of(name) is PARAMETERS[".".join(name.split(".")[-2:])]
    return found


def test_every_parameter_is_declared_and_every_declaration_is_used() -> None:
    assert shapes().keys() == PARAMETERS.keys()


def test_dimensions_that_ranks_divide_are_there() -> None:
    """The divided dimensions of a parameter differ; experts are not divided by `tp`."""
    for key, sizes in shapes().items():
        spec = PARAMETERS[key]
        dims = [dim for dim in (spec.tp, spec.ep, spec.etp) if dim is not None]
        assert len(dims) == len(set(dims)), key
        assert all(0 <= dim < len(size) for size in sizes for dim in dims), key
        assert (spec.ep is None) == (spec.etp is None) == (not key.startswith("experts.")), key
        assert spec.ep is None or spec.tp is None, key
        assert not spec.padded or dims, f"{key}: padded, and nobody divides it"


def with_another_parameter(config: ModelConfig) -> Decoder:
    model = Decoder(config)
    attention = model.layers[1].get_submodule("attention")
    attention.register_parameter("temperature", nn.Parameter(torch.ones(3)))
    return model


MESSAGE = re.escape(
    "parameter layers.1.attention.temperature: 'attention.temperature' is not declared; give it a "
    "ParamSpec in models/parameters.py"
)


def test_a_parameter_that_is_not_declared_is_refused() -> None:
    """Its initial value, and whether it decays, would have to be guessed."""
    model = with_another_parameter(GLM4)
    with pytest.raises(LookupError, match=f"^{MESSAGE}$"):
        initialize(model, GLM4, seed=0)
    with pytest.raises(LookupError, match=f"^{MESSAGE}$"):
        build_optimizer(model, OptimizerConfig(lr=1e-3))


@pytest.mark.parametrize(
    ("spec", "value", "decay"),
    [(ParamSpec("zeros", decay=False), 0.0, 0.0), (ParamSpec("ones"), 1.0, 0.5)],
)
def test_a_declaration_is_all_it_takes(
    spec: ParamSpec, value: float, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_another_parameter(GLM4)
    monkeypatch.setitem(PARAMETERS, "attention.temperature", spec)
    initialize(model, GLM4, seed=0)
    parameter = model.get_parameter("layers.1.attention.temperature")
    assert parameter.tolist() == [value] * 3
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-3, weight_decay=0.5))
    groups = optimizer.param_groups
    found = [g["weight_decay"] for g in groups if any(p is parameter for p in g["params"])]
    assert found == [decay]
