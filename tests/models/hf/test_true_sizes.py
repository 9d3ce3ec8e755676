"""The shipped true-size experiments: parameter counts equal transformers' and the published
ones."""

import json
from pathlib import Path

import pytest

from configs.loader import load
from models.counts import flops_per_token, parameter_counts
from models.hf.table import hf_config
from tests.runs import ROOT, run

COUNT = """
import json, sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM
counts = {}
for path in sorted(Path(sys.argv[1]).glob("*.json")):
    given = json.loads(path.read_text())
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counts[path.stem] = sum(p.numel() for p in model.parameters())
print(json.dumps(counts))
"""
PUBLISHED = {  # total, active with or without the input embedding, in units of 1e9
    "deepseek_v3_671b": (671, 37),
    "deepseek_v2_lite": (15.7, 2.4),
    "moonlight_16b_a3b": (16, 3),
    "qwen3_30b_a3b": (30.5, 3.3),
    "qwen3_235b_a22b": (235, 22),
    "mixtral_8x7b": (46.7, 12.9),
    "gpt_oss_20b": (20.9, 3.6),
    "gpt_oss_120b": (117, 5.1),
    "llama4_scout": (107.8, 17),
}
GFLOP_AT_4K = {"deepseek_v3_671b": 260.0, "qwen3_235b_a22b": 148.0, "qwen3_30b_a3b": 23.1}


def test_parameter_counts_equal_those_of_transformers(tmp_path: Path) -> None:
    ours = {}
    for name in PUBLISHED:
        model = load(ROOT / "configs" / f"{name}.toml").model
        described = hf_config(model, max_positions=4096, eos_token_id=0, dtype="bfloat16")
        (tmp_path / f"{name}.json").write_text(json.dumps(described))
        ours[name] = parameter_counts(model).total
    theirs = json.loads(run("-P", "-c", COUNT, tmp_path).stdout.splitlines()[-1])
    assert ours == theirs


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name: str) -> None:
    counts = parameter_counts(load(ROOT / "configs" / f"{name}.toml").model)
    total, active = PUBLISHED[name]
    assert round(counts.total / 1e9, 1) == pytest.approx(total, abs=0.25)
    candidates = [counts.active / 1e9, (counts.active - counts.embedding) / 1e9]
    assert min(abs(found - active) for found in candidates) <= 0.45


@pytest.mark.parametrize("name", GFLOP_AT_4K)
def test_flops_per_token(name: str) -> None:
    flops = flops_per_token(load(ROOT / "configs" / f"{name}.toml").model, 4096)
    assert flops / 1e9 == pytest.approx(GFLOP_AT_4K[name], rel=5e-3)
