"""Dequantization against transformers' own code and against plain loops; whole folders."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import UserError
from models.hf.files import read_model
from models.hf.quantized import dequantize_fp8, dequantize_mxfp4, scale_shape
from tests.models.families import DEEPSEEK_V3, GPT_OSS
from tests.models.hf.test_hf import random_decoder, write
from tests.runs import run

THEIRS = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
folder = sys.argv[1]
t = load_file(folder + "/given.check")
edge = [_dequantize_fp8_weight(t[k], t[k + "s"], [128, 128], torch.float32) for k in ("a", "b")]
whole = Fp8Dequantize(None)._dequantize_one(t["c"], t["cs"], torch.float32)
mx = convert_moe_packed_tensors(t["blocks"], t["scales"], dtype=torch.float32)
save_file({"a": edge[0], "b": edge[1], "c": whole, "mx": mx}, folder + "/theirs.check")
"""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def quantise_fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """E4M3 data, its factors, and the dequantized values, block by block."""
    scale = torch.empty(scale_shape(tuple(weight.shape), block))
    data, meaning = weight.to(torch.float8_e4m3fn), weight.clone()
    for r in range(scale.shape[0]):
        for c in range(scale.shape[1]):
            rows, columns = (slice(i * n, (i + 1) * n) for i, n in zip((r, c), block, strict=True))
            scale[r, c] = weight[rows, columns].abs().max() / 448 + 1e-12
            small = (weight[rows, columns] / scale[r, c]).to(torch.float8_e4m3fn)
            data[rows, columns] = small
            meaning[rows, columns] = small.float() * scale[r, c]
    return data, scale, meaning


def test_dequantisation_equals_that_of_transformers_bit_for_bit(tmp_path: Path) -> None:
    """Partial blocks at the edges; every byte of MXFP4 and scales down to subnormal results."""
    torch.manual_seed(0)
    given = {}
    for name, shape in (("a", (300, 257)), ("b", (3, 130, 128)), ("c", (256, 384))):
        given[name] = (torch.randn(shape) * 50).to(torch.float8_e4m3fn)
        given[f"{name}s"] = torch.rand(scale_shape(shape, (128, 128))) + 1e-3
    given["blocks"] = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8)
    given["blocks"].view(-1)[:256] = torch.arange(256, dtype=torch.uint8)
    given["scales"] = torch.randint(1, 250, (3, 10, 2), dtype=torch.uint8)
    save_file(given, tmp_path / "given.check")
    run("-P", "-c", THEIRS, tmp_path)
    theirs = load_file(tmp_path / "theirs.check")
    for name in "abc":
        ours = dequantize_fp8(given[name], given[f"{name}s"], (128, 128))
        assert torch.equal(ours, theirs[name]), name
    assert torch.equal(dequantize_mxfp4(given["blocks"], given["scales"]), theirs["mx"])


def test_mxfp4_by_hand() -> None:
    torch.manual_seed(1)
    blocks = torch.randint(0, 256, (2, 3, 2, 16), dtype=torch.uint8)
    scales = torch.randint(0, 255, (2, 3, 2), dtype=torch.uint8)
    ours = dequantize_mxfp4(blocks, scales)
    assert ours.shape == (2, 64, 3)
    for e, r, g, b in torch.cartesian_prod(*map(torch.arange, blocks.shape)).tolist():
        byte, power = int(blocks[e, r, g, b]), 2.0 ** (int(scales[e, r, g]) - 127)
        for half, bits in enumerate((byte & 15, byte >> 4)):
            value = E2M1[bits & 7] * (-1) ** (bits >> 3) * power
            expected = torch.tensor(value, dtype=torch.float64).float()
            assert ours[e, g * 32 + b * 2 + half, r] == expected


@pytest.mark.parametrize("first", [0, 1, 7, 8, 20])
def test_fp8_rows_from_the_middle(first: int) -> None:
    """A piece may begin within a block; block sizes need not divide the shape."""
    torch.manual_seed(2)
    data, scale, meaning = quantise_fp8(torch.randn(23, 19), (8, 6))
    part = dequantize_fp8(data[first:22], scale[first // 8 : -(-22 // 8)], (8, 6), first)
    assert torch.equal(part, meaning[first:22])


def fp8_folder(folder: Path, block: tuple[int, int]) -> dict[str, Tensor]:
    """Write a DeepSeek-V3 as published, with matrices in FP8 and the rest in bf16; returns the
    dequantized tensors."""
    write(random_decoder(DEEPSEEK_V3), folder)
    index: dict[str, str] = {}
    meanings: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors: dict[str, Tensor] = {}
        for name, value in load_file(path).items():
            if name.endswith("proj.weight") or "proj_with_mqa" in name:
                data, scale, meanings[name] = quantise_fp8(value, block)
                tensors |= {name: data, f"{name}_scale_inv": scale}
            else:
                kept = value if name.endswith("correction_bias") else value.bfloat16()
                tensors[name], meanings[name] = kept, kept.float()
        save_file(tensors, path)
        index |= dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": list(block),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return meanings


@pytest.mark.parametrize("block", [(128, 128), (16, 16), (7, 5)], ids=str)
def test_a_folder_in_fp8(block: tuple[int, int], tmp_path: Path) -> None:
    meanings = fp8_folder(tmp_path, block)
    state = read_model(tmp_path, torch.float32).state_dict()
    assert torch.equal(state["layers.0.attention.wo.weight"],
                       meanings["model.layers.0.self_attn.o_proj.weight"])  # fmt: skip
    for e in range(8):
        at = f"model.layers.2.mlp.experts.{e}"
        for i, part in enumerate(("gate", "up")):
            w13 = state["layers.2.ffn.experts.w13"]
            assert torch.equal(w13[e, i], meanings[f"{at}.{part}_proj.weight"])
        w2 = state["layers.2.ffn.experts.w2"]
        assert torch.equal(w2[e], meanings[f"{at}.down_proj.weight"])


def mxfp4_folder(folder: Path) -> None:
    model = replace(GPT_OSS, moe=replace(GPT_OSS.moe, d_expert=32))
    write(random_decoder(model), folder)
    torch.manual_seed(4)
    index: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        tensors: dict[str, Tensor] = {}
        for name, value in load_file(path).items():
            if name.endswith(("gate_up_proj", "down_proj")):
                n, columns, rows = value.shape
                packed = torch.randint(0, 256, (n, rows, columns // 32, 16), dtype=torch.uint8)
                tensors[f"{name}_blocks"] = packed
                scales = torch.randint(115, 130, (n, rows, columns // 32), dtype=torch.uint8)
                tensors[f"{name}_scales"] = scales
            else:
                tensors[name] = value.bfloat16()
        save_file(tensors, path)
        index |= dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_in_mxfp4(tmp_path: Path) -> None:
    mxfp4_folder(tmp_path)
    tensors = {k: v for p in tmp_path.glob("*.safetensors") for k, v in load_file(p).items()}
    state = read_model(tmp_path, torch.float32).state_dict()
    at = "model.layers.3.mlp.experts.gate_up_proj"
    gate_up = dequantize_mxfp4(tensors[f"{at}_blocks"], tensors[f"{at}_scales"])
    w13 = state["layers.3.ffn.experts.w13"]
    for e in range(6):  # gate and up interleaved along the output dimension
        assert torch.equal(w13[e, 0], gate_up[e].T[0::2])
        assert torch.equal(w13[e, 1], gate_up[e].T[1::2])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"quant_method": "awq"}, "quantization_config.quant_method = 'awq': only fp8"),
        ({"weight_block_size": None}, "weight_block_size = None: must be two integers"),
        ({"weight_block_size": [128]}, "weight_block_size = [128]: must be two integers"),
        ({"weight_block_size": [0, 128]}, "weight_block_size = [0, 128]"),
        ({"activation_scheme": "static"}, "activation_scheme = 'static': only 'dynamic'"),
        ({"fmt": "e5m2"}, "fmt = 'e5m2'"),
        ({"weight_block_size": [64, 64]}, "_scale_inv has shape [1, 1], which does not fit"),
        (None, "has no quantization_config for them"),
        ([], "quantization_config = []: must be an object"),
    ],
    ids=str,
)
def test_a_quantisation_we_do_not_know_is_refused(
    change: dict[str, object] | list[object] | None, expected: str, tmp_path: Path
) -> None:
    fp8_folder(tmp_path, (128, 128))
    config = json.loads((tmp_path / "config.json").read_text())
    if isinstance(change, dict):
        config["quantization_config"] |= change
    else:
        config["quantization_config"] = change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        read_model(tmp_path, torch.float32)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_scales_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    mxfp4_folder(tmp_path)
    path = next(p for p in tmp_path.glob("*.safetensors")
                if any(k.endswith("down_proj_scales") for k in load_file(p)))  # fmt: skip
    tensors = load_file(path)
    name = next(k for k in tensors if k.endswith("down_proj_scales"))
    tensors[name].view(-1)[5] = 255
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"down_proj holds inf or NaN"):
        read_model(tmp_path, torch.float32)
