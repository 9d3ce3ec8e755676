"""`scripts.export --dtype fp8`: export, import and second export; memory; refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from configs.model import ModelConfig
from models.hf.files import write_tensors
from models.hf.fp8_blocks import fp8_plan
from scripts import export as export_script
from tests.models.hf.test_fp8_blocks import FP8, wide, write_fp8
from tests.models.hf.test_hf import random_decoder, read_all, write
from tests.train.convert.live_bytes import LiveBytes
from tests.train.convert.test_import_hf import model_of, tokenizer  # noqa: F401
from train.convert.hf_import import import_hf


def exported(source: Path, *arguments: object) -> int:
    """Run the command; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["export", str(source), *map(str, arguments)])
        return export_script.main()


def imported(model: ModelConfig, folder: Path, tokenizer: Path) -> Path:  # noqa: F811
    """A run with random weights."""
    (folder / "hf").mkdir()
    write(random_decoder(model), folder / "hf")
    shutil.copy(tokenizer / "tokenizer.json", folder / "hf")
    import_hf(folder / "hf", folder / "run")
    return folder / "run"


@pytest.mark.parametrize(
    "name",
    # qwen3: its table is that of test_fp8_blocks.py, its export that of the next test
    ["glm4-mtp", "deepseek-v3", pytest.param("qwen3", marks=pytest.mark.slow), "mixtral"],
)
def test_out_in_and_out_again(
    name: str,
    tmp_path: Path,
    tokenizer: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = replace(wide(name), vocab_size=263)
    run = imported(model, tmp_path, tokenizer)
    assert exported(run, "--dtype", "fp8") == 0
    plan = fp8_plan(model)
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"{plan.share:.1%} of the parameters in FP8"
    out = run / "export"
    write_fp8(random_decoder(model), tmp_path / "direct")
    same(read_all(out), read_all(tmp_path / "direct"))
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == plan.quantization_config()
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["eos_token_id"] == 0
    assert not (out / "generation_config.json").exists(), "none was imported"
    tensors = load_file(out / "model-00001-of-00001.safetensors")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in tensors.values())
    assert index["weight_map"] == dict.fromkeys(tensors, "model-00001-of-00001.safetensors")

    saved, _ = import_hf(out, tmp_path / "again")
    masters = model_of(saved).state_dict()
    assert all(v.dtype == torch.float32 for v in masters.values())
    assert exported(tmp_path / "again", "--dtype", "fp8") == 0
    same(read_all(tmp_path / "again" / "export"), tensors)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name].float(), value.float()), name


def test_what_stays_bf16_is_said(
    tmp_path: Path,
    tokenizer: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = replace(wide("qwen3"), vocab_size=263)
    run = imported(replace(model, moe=replace(model.moe, d_expert=96)), tmp_path, tokenizer)
    assert exported(run, "--dtype", "fp8") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert "; 2 groups of projections stay bf16" in said
    assert said.endswith("the first is model.layers.1.mlp.experts")


def test_errors_are_one_line(
    tmp_path: Path,
    tokenizer: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = imported(replace(wide("gpt-oss"), vocab_size=263), tmp_path, tokenizer)
    for dtype, expected in (
        ("int4", "error: --dtype int4: must be one of fp32, bf16, fp8\n"),
        ("fp8", "error: --dtype fp8: GptOssForCausalLM: no reader has FP8 blocks for its fused"),
    ):
        assert exported(run, "--dtype", dtype) == 2
        said = capsys.readouterr().err
        assert said.startswith(expected) and said.count("\n") == 1
    assert not (run / "export").exists() and not list(run.glob(".export*"))


def test_memory_stays_below_two_shards(tmp_path: Path) -> None:
    model = replace(wide("qwen3"), n_layers=8)
    state = random_decoder(model).state_dict()

    def read(ours: str, index: Any) -> Tensor:
        return state[ours][index].clone()

    with LiveBytes() as live:
        files = write_tensors(tmp_path, model, read, FP8, 600_000)
    largest = max(path.stat().st_size for path in files)
    assert len(files) > 4 and 0.5 * largest < live.peak < 2 * largest
