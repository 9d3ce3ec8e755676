"""`--check`: sizes without inputs, missing inputs, and models of any depth; within this process."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from configs.__main__ import main as check_keys
from configs.errors import UserError
from configs.loader import load
from configs.model import ModelConfig
from configs.parallel_dims import default_world
from models.counts import flops_per_token, parameter_counts
from models.decoder import Decoder
from models.hf.families.deepseek import DEEPSEEK_V2
from models.hf.table import architecture, hf_config
from tests.configs.random_models import FEATURES, family_model
from tests.runs import ROOT, TINY, run
from train.__main__ import main
from train.check import missing_inputs

Check = Callable[..., tuple[int, str, str]]
EXPERIMENTS = sorted((ROOT / "configs").rglob("*.toml"))


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """Runs `python -m train ... --check`; returns the exit code and the printed text."""
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # keep pytest's own

    def run_check(*arguments: object) -> tuple[int, str, str]:
        code = main([*map(str, arguments), "--check"])
        out, err = capsys.readouterr()
        return code, out, err

    return run_check


@pytest.mark.parametrize("predicts", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_shipped_experiment_passes_without_its_inputs(
    path: Path, predicts: bool, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default without bytes: `test_command.py` has those of the demo, `memory/test_memory.py`
    those of a real experiment of each family."""
    if not predicts:
        monkeypatch.setattr("train.check._bytes_per_rank", lambda *_: [])  # takes seconds
    code, out, err = check(path, "--data.source=/absent/corpus")
    assert (code, err) == (0, "")
    assert "FLOPs / token" in out and "bytes per rank" in out
    missing = out.split("\nnot found\n")[1]
    assert "data.source = '/absent/corpus': no such file or folder" in missing
    assert ("data.tokenizer" in missing) == bool(load(path).data.tokenizer)


def test_what_is_missing_is_named_and_what_cannot_work_is_refused(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.check._bytes_per_rank", lambda *_: [])  # takes a second
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "empty").mkdir()
    for overrides, expected in (
        ([], ""),
        (["--data.tokenizer=/absent"], "data.tokenizer = '/absent': no such file or folder"),
        (["--checkpoint.init_from=/absent"], "checkpoint.init_from: /absent: no such folder"),
        (["--data.source=~nobody/x"], "data.source = '~nobody/x': no such file"),
        (["--data.source=owner/name"], "'owner/name': no such file or folder; a run will ask"),
        (["--data.source=/dev/null/x"], "data.source = '/dev/null/x': no such file"),
        ([f"--data.source=/{'x' * 300}"], "data.source = '/xxx"),
    ):
        found = missing_inputs(load(TINY, overrides))
        assert len(found) == bool(expected) and expected in "".join(found), overrides
    code, out, err = check(TINY, "--data.tokenizer=/absent")
    assert (code, err) == (0, "") and "\nnot found\n  data.tokenizer = '/absent'" in out
    for overrides, expected in (
        ([f"--data.tokenizer={tmp_path / 'bad.json'}"], "not a tokenizer.json"),
        ([f"--data.tokenizer={tmp_path / 'empty'}"], "the folder has no tokenizer.json"),
        ([f"--data.source={tmp_path / 'empty'}"], "no document in this folder"),
        ([f"--checkpoint.init_from={tmp_path / 'empty'}"], "holds no checkpoint"),
        (["--model.vocab_size=100"], "a byte-level tokenizer needs at least"),
    ):
        with pytest.raises(UserError, match=expected) as caught:
            missing_inputs(load(TINY, overrides))
        assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
    code, _, err = check(TINY, "--model.vocab_size=100")
    assert code == 2 and err.count("\n") == 1


def test_remarks_and_a_dense_model_are_said(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.check._bytes_per_rank", lambda *_: [])  # takes a second
    code, out, _ = check(TINY, "--model.n_dense_layers=3")
    assert code == 0 and "none of the 3 layers has experts" in out.split("\nremarks\n")[1]
    assert "\nremarks\n" not in check(TINY)[1]


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3", "gpt_oss", "llama4"])
def test_equal_layers_are_counted_once_and_rightly(name: str) -> None:
    model = load(ROOT / "configs" / "tiny" / f"{name}.toml", ["--model.n_layers=9"]).model
    with torch.device("meta"):
        decoder = Decoder(model)
    counts = parameter_counts(model)
    assert counts.total + counts.mtp == sum(p.numel() for p in decoder.parameters())
    of_blocks = [sum(p.numel() for p in block.parameters()) for block in decoder.blocks()]
    assert [every for every, _ in counts.layers] == of_blocks
    routed = sum(p.numel() for n, p in decoder.named_parameters() if ".experts." in n)
    assert sum(experts for _, experts in counts.layers) == counts.experts == routed


def test_a_thousand_layers_are_checked(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few blocks are built for any number of layers."""
    built: list[str] = []
    real: Callable[..., None] = nn.Module.__init__

    def counting(self: nn.Module, *arguments: Any, **options: Any) -> None:
        built.append(type(self).__name__)
        real(self, *arguments, **options)

    monkeypatch.setattr("torch.nn.Module.__init__", counting)
    code, out, _ = check(TINY, "--model.n_layers=1000")
    assert code == 0 and built.count("Block") < 50
    model = load(TINY, ["--model.n_layers=1000"]).model
    assert f"{parameter_counts(model).total:,}" in out
    assert flops_per_token(model, 32) > 10_000


LOAD = """
import json, sys, torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM
transformers.logging.set_verbosity_error()
errors = []
for given in json.loads(open(sys.argv[1]).read()):
    try:
        config = AutoConfig.for_model(given.pop("model_type"), **given)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        tokens = torch.arange(12)[None] % config.vocab_size
        with torch.no_grad():
            assert model(tokens).logits.isfinite().all()
        errors.append("")
    except Exception as error:
        errors.append(f"{type(error).__name__}: {error}")
print(json.dumps(errors))
"""


def test_what_check_promises_transformers_loads_and_runs(tmp_path: Path) -> None:
    """Twelve random models of every family, mostly with odd sizes; the DeepSeek-V2 models that we
    refuse fail in transformers."""
    promised: list[ModelConfig] = []
    refused: list[tuple[ModelConfig, str]] = []
    for family in FEATURES:
        for seed in range(12):
            model = family_model(family, seed)
            try:
                assert architecture(model)
                promised.append(model)
            except UserError as error:
                assert "\n" not in str(error) and "the nearest, " in str(error)
                if family == "deepseek_v2":
                    refused.append((model, str(error)))
    assert len({architecture(model) for model in promised}) == len(FEATURES)
    sound = next(model for model in promised if architecture(model) == DEEPSEEK_V2.architecture)
    configs = [describe(model) for model in promised]
    given = [describe(sound) | _sizes_of(model) for model, _ in refused]
    (tmp_path / "configs.json").write_text(json.dumps([*configs, *given]))
    errors = json.loads(run("-P", "-c", LOAD, tmp_path / "configs.json").stdout.splitlines()[-1])
    wrong = [(m, e) for m, e in zip(promised, errors, strict=False) if e]
    assert not wrong
    assert refused and all(errors[len(promised) :]), "refused without a need"


def _sizes_of(model: ModelConfig) -> dict[str, object]:
    a = model.attention
    return {
        "hidden_size": model.d_model, "num_attention_heads": a.n_heads,
        "num_key_value_heads": a.n_heads, "q_lora_rank": a.q_lora_rank or None,
        "kv_lora_rank": a.kv_lora_rank, "qk_nope_head_dim": a.qk_nope_head_dim,
        "qk_rope_head_dim": a.qk_rope_head_dim, "head_dim": a.qk_rope_head_dim,
        "v_head_dim": a.v_head_dim,
    }  # fmt: skip


def describe(model: ModelConfig) -> dict[str, object]:
    return hf_config(model, max_positions=64, eos_token_id=0, dtype="float32")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.d_model=66", "model.d_model (a multiple of attention.n_heads = 4)"),
        ("model.attention.qk_nope_head_dim=15", "model.attention.qk_nope_head_dim (an even one)"),
        ("model.attention.kv_lora_rank=31", "model.attention.kv_lora_rank (an even one)"),
    ],
)
def test_the_reason_is_said_before_training(
    override: str, reason: str, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.check._bytes_per_rank", lambda *_: [])  # takes 0.4 s
    code, out, _ = check(ROOT / "configs" / "tiny" / "deepseek_v2.toml", f"--{override}")
    assert code == 0 and reason in out.split("export as")[1].splitlines()[0]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_shipped_experiment_passes_for_its_ranks(path: Path) -> None:
    assert check_keys([str(path), f"--ranks={default_world(load(path))}"]) == 0


def test_the_command_line_itself() -> None:
    """Once as a separate process, as a user starts it."""
    words = ["-m", "train", "tests/tiny.toml", "--check", "--ranks=2", "--data.tokenizer=absent",
             "--model.n_layers=1", "--model.n_dense_layers=0"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "bytes per rank" in done.stdout and "data.tokenizer = 'absent'" in done.stdout
