"""The FP8 recipe on every family: which modules are converted, and that results stay close to
bf16."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from configs.precision import FP8Config
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.fp8 import apply_fp8, fp8_modules
from models.init import initialize
from tests.models.families import FAMILIES

NEVER = re.compile(r"embed|head|router|norm|sinks|bias|\.b13|\.b2")


def build(family: str) -> Decoder:
    model = Decoder(replace(FAMILIES[family], init_std=0.1))
    initialize(model, model.config, seed=1)
    return model


def losses_and_gradients(model: Decoder) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of two sequences, and the gradients of a loss that does not depend on logits alone."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 96, (2, 24), generator=generator)
    positions = torch.arange(24).expand(2, 24)
    logits = model(tokens.flatten(), positions.flatten(), DocumentAttention(positions))
    (logits.logsumexp(-1) - logits[:, 3]).sum().backward()
    return logits.detach(), {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_near_the_model(family: str) -> None:
    """Loose tolerances: these models are a few dozen wide, and a different choice of an expert is
    visible. A wrong product, or a gradient of another weight, gives cosines near zero."""
    exact = build(family)
    fp8 = copy.deepcopy(exact)
    names = apply_fp8(fp8, FP8Config())
    assert names == list(fp8_modules(fp8))
    assert [n for n, _ in fp8.named_parameters()] == [n for n, _ in exact.named_parameters()]
    expected, expected_grads = losses_and_gradients(exact)
    logits, grads = losses_and_gradients(fp8)
    assert not torch.equal(logits, expected)
    assert (logits - expected).norm() < 0.25 * expected.norm()
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        cosine = torch.cosine_similarity(grad.flatten(), expected_grads[name].flatten(), 0)
        assert cosine > 0.7, (name, cosine)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_and_expert_is_turned(family: str) -> None:
    model = build(family)
    apply_fp8(model, FP8Config())
    turned = {
        f"{name}.{key}"
        for name, module in fp8_modules(model).items()
        for key, _ in module.named_parameters(recurse=False)
    }
    for name, parameter in model.named_parameters():
        if NEVER.search(name) and not name.endswith("bias"):
            assert name not in turned or name.split(".")[-1] in ("b13", "b2"), name
        elif parameter.ndim > 1:
            assert name in turned, name


def test_what_is_kept() -> None:
    def turned(**options: object) -> set[str]:
        return set(apply_fp8(build("deepseek-v3-mtp"), FP8Config(**options)))  # type: ignore[arg-type]

    every = turned()
    assert {name.split(".")[0] for name in every} == {"layers", "mtp"}
    assert turned(keep=("layers.0",)) == {n for n in every if not n.startswith("layers.0.")}
    assert turned(keep=("*.wo",)) == {n for n in every if not n.endswith(".wo")}
    assert turned(keep=("*.attention", "mtp.1.*")) == {
        n for n in every if ".attention." not in n and not n.startswith("mtp.1.")
    }
    assert turned(first_bf16=2) == {n for n in every if not re.match(r"layers\.[01]\.", n)}
    assert turned(last_bf16=3) == {n for n in every if not re.match(r"mtp\.|layers\.2\.", n)}
    assert turned(keep=("head", "layers.*.ffn.router")) == every  # never converted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            FP8Config(keep=("layers.9.*",)),
            r"no module is called 'layers\.9\.\*'.*such as layers\.0\.",
        ),
        (FP8Config(keep=("*",)), "leaves every module in bf16"),
        (FP8Config(first_bf16=2, last_bf16=2), "leaves every module in bf16"),
    ],
)
def test_nothing_is_skipped_in_silence(options: FP8Config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply_fp8(build("qwen3"), options)
