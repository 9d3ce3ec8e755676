"""Settings that are valid individually but not together are refused with key and remedy; settings
without effect are reported; every config that loads can be built and run."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from configs.config_warnings import config_warnings
from configs.errors import ConfigError
from configs.loader import load
from configs.model import ModelConfig, RopeConfig
from configs.rules import shown
from models.counts import flops_per_token, parameter_counts
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.init import initialize
from models.layers.rope import inverse_frequencies, logit_scale, table_scale
from tests.configs.random_models import random_models
from tests.runs import ROOT, TINY

MLA = ROOT / "configs" / "tiny" / "deepseek_v3.toml"
GQA_KEYS = ("n_kv_heads=2", "head_dim=8", "qk_norm=rms", "qk_norm=l2", "bias=true", "sinks=true",
            "rope_on_full=false", "temperature_floor=8", "temperature_scale=0.5")  # fmt: skip
MLA_KEYS = ("q_lora_rank=8", "kv_lora_rank=8", "qk_nope_head_dim=8", "qk_rope_head_dim=8",
            "v_head_dim=8")  # fmt: skip
LLAMA3 = ("--model.rope.scaling=llama3", "--model.rope.original_length=64", "--model.rope.factor=4")
YARN = ("--model.rope.scaling=yarn", *LLAMA3[1:])
WIDE = "--model.attention.qk_nope_head_dim=1" + "0" * 30


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500
    return str(caught.value)


@pytest.mark.parametrize("setting", MLA_KEYS)
def test_keys_of_mla_are_refused_in_gqa(setting: str) -> None:
    line = refusal(TINY, f"--model.attention.{setting}")
    assert setting.split("=")[0] in line and "belongs to kind = mla" in line


@pytest.mark.parametrize("setting", GQA_KEYS)
def test_keys_of_gqa_are_refused_in_mla(setting: str) -> None:
    line = refusal(MLA, f"--model.attention.{setting}")
    assert setting.split("=")[0] in line and "belongs to kind = gqa" in line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--model.rope.factor=4"], "belongs to scaling = yarn or llama3"),
        (["--model.rope.original_length=64"], "belongs to scaling = yarn or llama3"),
        *(([f"--model.rope.{key}"], "belongs to scaling = yarn") for key in
          ("beta_fast=16", "beta_slow=2", "truncate=false", "mscale=1", "mscale_all_dim=1")),
        *(([f"--model.rope.{key}"], "belongs to scaling = llama3") for key in
          ("low_freq_factor=2", "high_freq_factor=8")),
        ([*LLAMA3, "--model.rope.beta_fast=16"], "belongs to scaling = yarn"),
        ([*YARN, "--model.rope.high_freq_factor=8"], "belongs to scaling = llama3"),
        *(([*YARN, f"--model.rope.{key}={value}"], f"{key} = ") for key in
          ("beta_fast", "beta_slow") for value in ("0", "-5", "-0.0", "1e308", "5e-324")),
        ([*YARN, "--model.rope.beta_fast=0.5"], "must not exceed beta_fast"),
        *(([*LLAMA3, f"--model.rope.{key}={value}"], f"{key} = ") for key in
          ("low_freq_factor", "high_freq_factor") for value in ("0", "-1", "1e308", "5e-324")),
        ([*LLAMA3, "--model.rope.low_freq_factor=8"], "must not exceed high_freq_factor"),
        *(([f"--model.rope.theta={value}"], "theta = ") for value in
          ("1", "0.5", "0", "-3", "1e13")),
        (["--model.rope.scaling=yarn"], "needs it"),
    ],
)  # fmt: skip
def test_rope_that_means_nothing_is_refused(overrides: list[str], expected: str) -> None:
    assert expected in refusal(TINY, *overrides)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        *((f"--optimizer.{key}=1e308", f"optimizer.{key} = 1e+308: must lie between") for key in
          ("lr", "eps", "weight_decay")),
        ("--optimizer.eps=0", "optimizer.eps = 0.0"),
        ("--train.clip_norm=1e308", "train.clip_norm"),
        ("--schedule.warmup_steps=13", "train.steps = 12"),
        ("--train.steps=1", "schedule.warmup_steps = 2: longer than"),
        ("--data.cache_dir=", "data.cache_dir is empty"),
        ("--data.text_field=", "data.text_field is empty"),
        ("--data.text_field=  ", "data.text_field is empty"),
        ("--data.source= ", "data.source is empty"),
        *((f"--run.dir={root}", "root of the file system") for root in
          ("/", "//", "/.", "/any/..", "///")),
        ('--run.dir="a\\u0000b"', "NUL"),
        ("--run.dir=a\0b", "NUL"),
        ("--run.dir=\udcff", "UTF-8"),
        ("--train.steps=13\nmicro_batch = 4", "a line break"),
        ("--train.steps=13 # longer", "must be an integer"),
        ("--model.d_model=1" + "0" * 30, "at most 64 bits"),
        (WIDE, "at most 64 bits"),
        ("--model.attention.head_dim=16777216", "n_heads 4 x width 16777216"),
        ("--model.moe.n_experts=65536\x00", "must be an integer"),
        ("--data.seq_len=16777217", "must lie between"),
        ("--parallel.dp_replicate=9223372036854775807", "must lie between"),
        ("--validation.every=9223372036854775807", "must lie between"),
        ("--precision.fp8.keep=wo", "must be a list of strings"),
        ("--model.top_k=3", "did you mean model.moe.top_k?"),
        ("--model.moe={n_experts = 4}", "model.moe.top_k: this key is required"),
        ("--model.moe={n_experts = 4, top_k = 9, d_expert = 8}", "--model.moe={n_experts"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_with_its_key(override: str, expected: str) -> None:
    assert expected in refusal(TINY, override)


@pytest.mark.parametrize("key", ["run.dir", "data.cache_dir"])
def test_the_root_of_the_file_system_by_any_way(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("/")
    up = "/".join([".."] * len(tmp_path.parts))
    for way in (up, "link", f"link/usr/{up}", f"~/{up}", f"{tmp_path}/{up}"):
        monkeypatch.setenv("HOME", str(tmp_path))
        expected = f"{key} = {shown(way)}: leads to the root of the file system"
        assert expected in refusal(TINY, f"--{key}={way}"), way
    monkeypatch.setenv("HOME", "/")
    assert "root of the file system" in refusal(TINY, f"--{key}=~")
    load(TINY, [f"--{key}=~/runs"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--data.seq_len=16777216", "--model.moe.top_k=3"], "rows of experts"),
        (["--model.moe.d_expert=16777216", "--model.moe.n_shared_experts=2"], "at most 16777216"),
        (["--model.d_model=16777216", "--model.vocab_size=16777216", "--model.d_ff=16777216"],
         "parameters, more than"),
        (["--model.d_model=16777216", "--model.n_layers=10000", "--model.moe.n_experts=65536"],
         "parameters, more than"),
        (["--data.seq_len=16777216", "--train.micro_batch=1", "--model.attention.n_heads=4096",
          "--model.attention.n_kv_heads=0", "--model.attention.head_dim=2"], "attention scores"),
    ],
)  # fmt: skip
def test_sizes_beyond_counting_are_refused(overrides: list[str], expected: str) -> None:
    assert expected in refusal(TINY, *overrides)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--model.n_dense_layers=3"], "none of the 3 layers has experts"),
        (["--model.moe_every=4"], "none of the 3 layers has experts"),
        (["--model.n_dense_layers=0"], "model.d_ff = 48: no effect"),
        (["--model.attention.full_every=3"], "full_every = 3: no effect"),
        (["--model.attention.local=window", "--model.attention.local_size=4"], "local = window"),
        (["--model.attention.temperature_floor=8"], "temperature_floor = 8: no effect"),
        ([*YARN, "--model.rope.mscale=1"], "mscale = 1.0"),
        (["--train.mtp_weight=0.1"], "train.mtp_weight = 0.1: no effect"),
        (["--schedule.kind=cosine", "--schedule.decay_fraction=0.5"], "decay_fraction = 0.5"),
        (["--parallel.recompute_keep=[]"], "recompute_keep"),
        (["--parallel.dispatch.capacity_factor=3"], "capacity_factor = 3.0: no effect"),
        (["--parallel.dispatch.on_overflow=stop"], "on_overflow"),
        (["--optimizer.lr=30"], "optimizer.lr = 30.0: unusual"),
    ],
)
def test_what_has_no_effect_is_said(overrides: list[str], expected: str) -> None:
    (line,) = config_warnings(load(TINY, overrides))
    assert expected in line and "\n" not in line


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.toml")), ids=lambda p: p.name)
def test_nothing_is_said_of_the_shipped_experiments(path: Path) -> None:
    assert config_warnings(load(path)) == []


@pytest.mark.parametrize("theta", [1.0001, 1.5, 1e4, 1e12])
@pytest.mark.parametrize("length", [1, 2**31])
@pytest.mark.parametrize("factor", [1.0, float(2**31)])
def test_every_rope_that_loads_has_finite_frequencies(
    theta: float, length: int, factor: float
) -> None:
    common: dict[str, Any] = {"theta": theta, "original_length": length, "factor": factor}
    bounds = (1e-6, 1.0, 1e6)
    for low in bounds:
        for high in (value for value in bounds if value >= low):
            for truncate in (True, False):
                yarn = RopeConfig(**common, scaling="yarn", beta_slow=low, beta_fast=high,
                            truncate=truncate, mscale=1000.0, mscale_all_dim=1000.0)  # fmt: skip
                check_rope(yarn)
            check_rope(
                RopeConfig(**common, scaling="llama3", low_freq_factor=low, high_freq_factor=high)
            )


def check_rope(rope: RopeConfig) -> None:
    for dim in (2, 64):
        frequencies = inverse_frequencies(rope, dim, torch.device("cpu"))
        assert frequencies.isfinite().all() and (frequencies >= 0).all(), rope
    assert table_scale(rope) > 0 and logit_scale(rope) > 0


@pytest.mark.parametrize(
    "start", [0, 20, 40, *(pytest.param(n, marks=pytest.mark.slow) for n in (60, 80, 100))]
)
def test_whatever_loads_can_be_built_and_run(start: int) -> None:
    for model in random_models(range(start, start + 20)):
        try:
            run_once(model)
        except Exception as error:
            raise AssertionError(model) from error


def run_once(model: ModelConfig) -> None:
    decoder = Decoder(model)
    counted = sum(
        p.numel()
        for name, p in decoder.named_parameters()
        if p.ndim >= 2 and not name.endswith((".b13", ".b2"))
    )
    assert counted == model.n_parameters
    counts = parameter_counts(model)
    assert counts.total + counts.mtp == sum(p.numel() for p in decoder.parameters())
    assert flops_per_token(model, 12) > 0
    initialize(decoder, model, seed=0)
    tokens = torch.randint(0, model.vocab_size, (24,), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(12).repeat(2, 1)
    positions[0, 5:] -= 5
    ahead = [(tokens, F.linear)] * model.mtp_depth
    found = decoder(tokens, positions.flatten(), DocumentAttention(positions), mtp_outputs=ahead)
    outputs = found if isinstance(found, tuple) else (found,)
    torch.stack([output.square().mean() for output in outputs]).sum().backward()
    assert all(output.isfinite().all() for output in outputs)
    gradients = [p.grad for p in decoder.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
