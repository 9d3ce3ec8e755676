"""`configs/tiny`: one experiment per family, trained with the program as a reader would."""

import pytest

from configs.loader import load
from configs.schema import JobConfig
from models.hf.table import architecture
from tests.runs import ROOT
from tests.train.in_process import run_train
from train.report.metrics import read_lines

FAMILIES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "qwen3": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "llama4": "Llama4ForCausalLM",
    "glm4": "Glm4MoeForCausalLM",
}
TRUE_SIZES = {
    "deepseek_v3": ["deepseek_v3_671b"],
    "deepseek_v2": ["deepseek_v2_lite"],
    "qwen3": ["qwen3_30b_a3b", "qwen3_235b_a22b"],
    "mixtral": ["mixtral_8x7b"],
    "gpt_oss": ["gpt_oss_20b", "gpt_oss_120b"],
    "llama4": ["llama4_scout"],
}


def tiny(family: str) -> JobConfig:
    return load(ROOT / "configs" / "tiny" / f"{family}.toml")


def test_there_is_one_per_family_and_it_is_of_that_family() -> None:
    files = {path.stem for path in (ROOT / "configs" / "tiny").glob("*.toml")}
    assert files == FAMILIES.keys()
    assert {family: architecture(tiny(family).model) for family in FAMILIES} == FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_steps_lower_the_loss(family: str, overrides: list[str]) -> None:
    folder = overrides[-1].removeprefix("--run.dir=")
    run_train(
        f"configs/tiny/{family}.toml", *overrides, "--model.vocab_size=320",
        "--train.steps=12", "--train.global_batch=8", "--train.micro_batch=8",
        "--validation.sequences=8",
    )  # fmt: skip
    records = read_lines(ROOT / folder / "metrics.jsonl")
    assert len(records) == 12 and records[-1]["loss"] < records[0]["loss"] - 0.5
    moe, first, last = tiny(family).model.moe, records[0], records[-1]
    expected = {
        "router/sequence_balance": moe.seq_aux_loss_coef,
        "router/global_balance": moe.global_aux_loss_coef,
        "router/router_z": moe.router_z_loss_coef,
    }
    assert {name for name in last if name.startswith("router/")} == {
        name for name, coefficient in expected.items() if coefficient
    }
    assert all(last[name] > 0 for name in last if name.startswith("router/"))
    if tiny(family).model.mtp_depth:
        assert last["mtp_loss_1"] < first["mtp_loss_1"] - 0.3
        assert last["validation_loss"] < first["loss"]
    else:
        assert "mtp_loss_1" not in last


@pytest.mark.parametrize("family", TRUE_SIZES)
def test_true_sizes_balance_as_the_tiny_ones_do(family: str) -> None:
    """The kinds of losses are those of the family; DeepSeek-V3's numbers are from its report."""
    keys = ("seq_aux_loss_coef", "global_aux_loss_coef", "bias_update_rate")
    for name in TRUE_SIZES[family]:
        config = load(ROOT / "configs" / f"{name}.toml")
        ours = [bool(getattr(config.model.moe, key)) for key in keys]
        assert ours == [bool(getattr(tiny(family).model.moe, key)) for key in keys], name
        assert config.model.mtp_depth == tiny(family).model.mtp_depth
    if family == "deepseek_v3":
        moe = config.model.moe
        assert (moe.seq_aux_loss_coef, moe.bias_update_rate) == (1e-4, 1e-3)
        assert (config.model.mtp_depth, config.train.mtp_weight) == (1, 0.3)
