"""Training in FP8 on several ranks: gathered weights, layers, steps, and refusals.

The scripts that the ranks run document the comparisons and tolerances.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from torch import nn

from configs.errors import UserError
from configs.loader import from_dict
from configs.parallel_dims import resolve
from configs.precision import FP8Config
from models.attention import GroupedQueryAttention
from models.decoder import Decoder
from models.fp8 import apply_fp8
from models.layers.linear import project
from parallel.apply import parallelize
from parallel.mesh import Mesh
from tests.parallel.fp8.fp8_models import GQA, Case
from tests.runs import TINY, run
from train.check import report

FP8 = "--precision.recipe=fp8_blockwise"


def faults(script: str, ranks: int, part: str, folder: Path) -> list[str]:
    """part: "i/n" selects every n-th case, starting with the i-th, backwards if n is negative; more
    words follow."""
    path = f"tests/parallel/fp8/{script}.py"
    run(path, folder, *part.split("/"), ranks=ranks, timeout=600)
    found: list[str] = json.loads((folder / "faults.json").read_text())
    return found


SLOW = pytest.mark.slow


@pytest.mark.long
@pytest.mark.parametrize(
    ("ranks", "part"),
    [
        (1, "0/2"),  # widths that are no multiple of a block; weights not quantized again
        (2, "1/2"),  # each rank's experts, both orders of a weight; MLA, powers of two
        (4, "5/6"),  # shards of the parts of tp and etp
        *(pytest.param(*few, marks=SLOW)
          for few in [(1, "1/2"), (2, "0/2"), (4, "0/3"), (4, "1/3"), (4, "2/3")]),
    ],
)  # fmt: skip
def test_gathered_weights_are_the_quantised_masters(ranks: int, part: str, tmp_path: Path) -> None:
    assert not faults("fp8_weights_run", ranks, part, tmp_path)


@pytest.mark.parametrize(
    ("ranks", "part"),
    [
        # each of the models; the last case combines what the meshes of these have
        (2, "6/-2"),
        *(
            pytest.param(*few, marks=SLOW)
            for few in [(1, "0/1"), (2, "1/2"), (2, "8/1"), (4, "0/1")]
        ),
    ],
)
def test_layers_multiply_the_same_on_every_mesh(ranks: int, part: str, tmp_path: Path) -> None:
    assert not faults("fp8_layers_run", ranks, part, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    ("ranks", "part"),
    [
        (2, "0/3/together"),
        *(
            pytest.param(ranks, part, marks=SLOW)
            for ranks, part in [(2, "0/3"), (2, "1/3"), (2, "2/3"), (4, "0/1")]
        ),
    ],
)
def test_recomputation_and_resharding_change_no_bit(ranks: int, part: str, tmp_path: Path) -> None:
    """By default several settings at once."""
    assert not faults("fp8_steps_run", ranks, part, tmp_path)


def decoder() -> Decoder:
    with torch.device("meta"):
        return Decoder(GQA)


def test_what_computes_in_fp8() -> None:
    attention = [f"attention.{name}" for name in ("wq", "wk", "wv", "wo")]
    moe = [*attention, "ffn.experts", "ffn.shared_experts"]
    first = [f"layers.0.{name}" for name in [*attention, "ffn"]]
    second = [f"layers.1.{name}" for name in moe]
    for options, expected in (
        (FP8Config(), first + second),
        (FP8Config(first_bf16=1), second),
        (FP8Config(last_bf16=1), first),
        (FP8Config(keep=("layers.1",)), first),
        (FP8Config(keep=("layers.0.attention", "*.experts", "layers.0.ffn")),
         [name for name in second if "experts" not in name or "shared" in name]),
    ):  # fmt: skip
        assert apply_fp8(decoder(), options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (FP8Config(keep=("layers.0.attention", "layers.7.*")),
         r"keep: no module is called 'layers\.7\.\*'; names are such as layers\.0\.attention\.wq$"),
        (FP8Config(keep=("layers.*",)), "leaves every module in bf16"),
        (FP8Config(first_bf16=1, last_bf16=1), "leaves every module in bf16"),
    ],
)  # fmt: skip
def test_a_pattern_that_matches_nothing_or_all_is_refused(options: FP8Config, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        apply_fp8(decoder(), options)
    assert "\n" not in str(refused.value)


def test_a_device_without_fp8_is_refused_with_the_first_layer() -> None:
    config = from_dict(Case("gqa", fp8={"keep": ("layers.0.attention",)}).settings(), "here")
    mesh = cast(Mesh, SimpleNamespace(dense=SimpleNamespace(device_type="cuda")))
    with (
        patch.object(torch.cuda, "get_device_capability", lambda device: (8, 0)),
        patch.object(torch.version, "hip", None),
        pytest.raises(UserError, match=r"fp8_blockwise': layers\.0\.ffn: .* 8\.0: train in bf16"),
    ):
        parallelize(decoder(), mesh, config, torch.bfloat16)


def test_recipe_and_mesh_are_refused_before_the_data_is_touched(tmp_path: Path) -> None:
    arguments = [TINY, FP8, f"--run.dir={tmp_path / 'run'}", "--data.source=/nowhere"]
    done = run("-m", "train", *arguments, "--precision.fp8.keep=['none.*']", code=2)
    assert "no module is called 'none.*'" in done.stderr
    done = run("-m", "train", *arguments, "--parallel.tp=2", ranks=2, code=1)
    assert "layers.0.attention.wq.weight is divided into parts of 16 (of 32)" in done.stderr


@pytest.mark.parametrize(
    ("parallel", "fp8", "name", "cut"),
    [
        ({"tp": 2}, {}, "layers.0.attention.wq.weight", "parts of 96 .of 192."),
        ({"tp": 2}, {"keep": ("*.attention",)}, "layers.0.ffn.w13", "parts of 192 .of 384."),
        ({"tp": 2, "etp": 2}, {"keep": ("*.attention", "layers.0.ffn", "*.shared_experts")},
         "layers.1.ffn.experts.w13", "parts of 64 .of 128."),
        ({"tp": 2, "ep": 2}, {"keep": ("*.attention", "layers.0.ffn", "*.shared_experts")}, "", ""),
    ],
)  # fmt: skip
def test_check_refuses_parts_that_cut_blocks(
    parallel: dict[str, Any], fp8: dict[str, Any], name: str, cut: str
) -> None:
    settings = Case("gqa", parallel, fp8).settings()
    settings["model"]["attention"]["head_dim"] = 48
    settings["model"]["moe"]["d_expert"] = 128
    settings["model"]["d_ff"] = 384
    config = from_dict(settings, "here")
    if not name:
        assert "shards in FP8" in report(config, resolve(config, 2))
        return
    key = "etp" if "etp" in parallel else "tp"
    message = f"{name} is divided into {cut}.*multiples of 128; use a smaller parallel.{key}, or"
    with pytest.raises(UserError, match=message) as refused:
        report(config, resolve(config, 2))
    assert "\n" not in str(refused.value)


def test_layers_that_share_an_input_are_called_each() -> None:
    """FSDP2 uses its hooks to determine when the weights of a group may be freed."""
    model = Decoder(GQA)
    apply_fp8(model, FP8Config())
    attention = model.layers[0].get_submodule("attention")
    assert isinstance(attention, GroupedQueryAttention)
    layers, called = [attention.wq, attention.wk, attention.wv], list[nn.Module]()
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.02)
        layer.register_forward_hook(lambda module, *_: called.append(module))
    x_TD = torch.randn(5, GQA.d_model, generator=torch.Generator().manual_seed(0))
    together = project(x_TD, *layers)
    assert called == layers
    for layer, y_TN in zip(layers, together, strict=True):
        assert torch.equal(layer(x_TD), y_TN)


def test_weights_on_the_host_are_refused() -> None:
    case = Case("gqa", {"cpu_offload": True})
    with pytest.raises(UserError, match=r"cpu_offload = true: .*'bf16' or cpu_offload = false"):
        from_dict(case.settings(), "here")
    bf16 = replace(case, fp8={}).settings() | {"precision": {"recipe": "bf16"}}
    assert from_dict(bf16, "here").parallel.cpu_offload
