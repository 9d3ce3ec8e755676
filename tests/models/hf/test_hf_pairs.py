"""Two keys with the same meaning: the behavior of transformers is followed, or an error names
both."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.hf.files import write_tensors
from models.hf.table import hf_config
from serve.engine.loading import open_export
from tests.models.families import FAMILIES
from tests.models.hf.test_hf import random_decoder
from tests.models.hf.transformers_peer import (
    DENSE,
    SEVEN,
    follow_or_refuse,
    logits_of,
    our_logits,
    their_logits,
    with_config,
)

Config = dict[str, Any]
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
ORIGINAL = "original_max_position_embeddings"


def base_of(folder: Path) -> Config:
    raw: Config = json.loads((folder / "config.json").read_text())
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        raw.pop(key, None)
    return raw


def yarn(**more: Any) -> Config:
    return YARN | more


Case = tuple[Callable[[float], Config], str | None]
# given the default rope_theta T: keys, and the names in an error; None: it must be followed
ROPE: dict[str, Case] = {
    "no key at all": (lambda T: {}, None),
    "theta beside": (lambda T: {"rope_theta": 3e4}, None),
    "theta within": (lambda T: {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}},
                     None),
    "theta in both": (lambda T: {"rope_theta": 3e4, "rope_parameters": {"rope_theta": 3e4}}, None),
    "theta twice": (lambda T: {"rope_theta": 2e4, "rope_parameters": {"rope_theta": 3e4}},
                    "rope_theta = 20000.0, but rope_parameters.rope_theta = 30000.0"),
    "as model cards advise": (
        lambda T: {"rope_theta": 3e4, "rope_scaling": yarn(),
                   "rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}, None),
    "with the older type": (
        lambda T: {"rope_theta": 3e4, "rope_scaling": yarn(type="yarn"),
                   "rope_parameters": {"type": "default", "rope_theta": 3e4}}, None),
    "theta would be lost": (
        lambda T: {"rope_scaling": yarn(),
                   "rope_parameters": {"rope_type": "default", "rope_theta": 3e4}},
        "rope_parameters = {"),
    "default theta": (
        lambda T: {"rope_scaling": yarn(),
                   "rope_parameters": {"rope_type": "default", "rope_theta": T}}, None),
    "two stretches": (
        lambda T: {"rope_scaling": yarn(factor=4.0), "rope_parameters": yarn()},
        "rope_scaling = {"),
    "the stretch taken back": (
        lambda T: {"rope_scaling": {"rope_type": "default"}, "rope_parameters": yarn()},
        "rope_scaling = {"),
    "the same stretch twice": (
        lambda T: {"rope_scaling": yarn(beta_fast=32), "rope_parameters": yarn()}, None),
    "an empty older key": (lambda T: {"rope_scaling": {}, "rope_parameters": yarn()}, None),
    "null beside": (lambda T: {"rope_scaling": None, "rope_parameters": yarn()}, None),
    "two types": (lambda T: {"rope_scaling": yarn(type="default")}, "type = 'default'"),
    "only type": (
        lambda T: {"rope_scaling": {"type": "yarn", "factor": 8.0, ORIGINAL: 16}}, None),
    "original length beside": (
        lambda T: {ORIGINAL: 16, "rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, None),
    "original length in both": (lambda T: {ORIGINAL: 16, "rope_parameters": yarn()}, None),
    "original length twice": (
        lambda T: {ORIGINAL: 8, "rope_parameters": yarn()},
        f"{ORIGINAL} = 8 and rope_parameters.{ORIGINAL} = 16"),
    "no original length": (
        lambda T: {"max_position_embeddings": 32,
                   "rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, None),
    "no original length, llama3": (
        lambda T: {"max_position_embeddings": 32,
                   "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": T,
                                       "low_freq_factor": 1.0, "high_freq_factor": 4.0}}, None),
    "llama3 without a bound": (
        lambda T: {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, ORIGINAL: 16,
                                       "rope_theta": T, "low_freq_factor": 1.0}},
        "'high_freq_factor' is missing"),
    "beta 0": (lambda T: {"rope_parameters": yarn(beta_fast=0, beta_slow=0)}, None),
    "beta null": (lambda T: {"rope_parameters": yarn(beta_fast=None, beta_slow=None)}, None),
    "beta given": (lambda T: {"rope_parameters": yarn(beta_fast=8, beta_slow=2)}, None),
    "not truncated": (lambda T: {"rope_parameters": yarn(truncate=False)}, None),
    "truncate in words": (lambda T: {"rope_parameters": yarn(truncate="false")}, "truncate ="),
    "truncate a number": (lambda T: {"rope_parameters": yarn(truncate=0)}, "truncate = 0"),
    "truncate null": (lambda T: {"rope_parameters": yarn(truncate=None)}, "truncate = None"),
    "half rotated": (lambda T: {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
}  # fmt: skip


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*SEVEN, *DENSE])
def test_rope(name: str, every: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    """every: every case; otherwise a fifth, so that a case meets two families."""
    base, folder = base_of(folders[name]), folders[name]
    theta = {"mixtral": 1e6, "gpt-oss": 1.5e5, "llama4": 5e5}.get(name, 1e4)
    turn = [*SEVEN, *DENSE].index(name)
    for case, (keys, expected) in ROPE.items() if every else [*ROPE.items()][turn % 5 :: 5]:
        raw = copy.deepcopy(base | keys(theta))
        if name == "glm4" and case != "half rotated":  # it rotates half of a head by default
            raw["partial_rotary_factor"] = 1.0
        told = follow_or_refuse(folder, raw, tmp_path / "hf")
        assert (expected or "") in told and bool(told) == (expected is not None), (case, told)


def test_gpt_oss_without_a_rope_key_is_stretched(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its class defaults to YaRN with a factor of 32; an empty object means that there is no
    scaling."""
    folder, base = folders["gpt-oss"], base_of(folders["gpt-oss"])
    assert follow_or_refuse(folder, base | {"rope_parameters": {}}, tmp_path / "hf") == ""
    plain = our_logits(tmp_path / "hf")
    assert follow_or_refuse(folder, base | {"rope_scaling": None}, tmp_path / "hf") == ""
    assert (our_logits(tmp_path / "hf") - plain).norm() > 0.01 * plain.norm()


@pytest.mark.parametrize("name", ["qwen3", "glm4", "mixtral"])
def test_the_server_follows_a_stretch_beside_rope_parameters(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    raw: Config = json.loads((folders[name] / "config.json").read_text())
    with_config(folders[name], raw | {"rope_scaling": YARN}, tmp_path / "hf")
    theirs = their_logits(tmp_path / "hf")
    ours = logits_of(open_export(tmp_path / "hf", dtype="fp32", device="cpu").model)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert (their_logits(folders[name]) - theirs).norm() > 0.05 * theirs.norm(), "YaRN shows"


OTHERS: list[tuple[str, Config, str | None]] = [
    ("qwen3", {"model_type": "mixtral"}, "model_type = 'mixtral', but architectures"),
    ("qwen3", {"dtype": "bfloat16"}, "dtype = 'bfloat16' and torch_dtype = 'float32'"),
    ("qwen3", {"dtype": "int8"}, "dtype = 'int8'"),
    ("qwen3", {"num_experts": 4}, "num_experts = 4 and num_local_experts = 8"),
    ("qwen3", {"n_routed_experts": 4}, "n_routed_experts = 4"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "layer_types = ["),
    ("qwen3", {"layer_types": ["full_attention"] * 3}, None),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window = True"),
    ("qwen3", {"sliding_window": 8}, None),  # not read
    ("qwen3", {"mlp_layer_types": ["sparse"] * 3}, "mlp_layer_types = ['sparse'"),
    ("qwen3", {"mlp_layer_types": ["dense", "sparse", "sparse"]}, None),
    ("qwen3", {"mlp_only_layers": [False]}, "mlp_only_layers = [False]"),
    ("qwen3", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
    ("qwen3", {"head_dim": 8}, "has shape"),
    ("qwen3", {"per_layer_config": {"0": {"num_attention_heads": 2}}}, "per_layer_config"),
    ("mixtral", {"sliding_window": 8}, "sliding_window = 8"),
    ("mixtral", {"head_dim": None}, None),
    ("mixtral", {"layer_types": ["sliding_attention"] * 2}, "layer_types = ["),
    ("glm4", {"num_mtp_layers": 1}, "num_nextn_predict_layers = 0 and num_mtp_layers = 1"),
    ("deepseek-v3", {"num_mtp_layers": 1}, "num_nextn_predict_layers = 0 and num_mtp_layers = 1"),
    ("deepseek-v3", {"num_key_value_heads": 2}, "num_key_value_heads = 2, but num_attention_heads"),
    ("deepseek-v3", {"head_dim": 16}, "head_dim = 16, but qk_rope_head_dim = 8"),
    ("deepseek-v3", {"qk_head_dim": 16}, "qk_head_dim = 16, but qk_nope_head_dim + qk_rope"),
    ("deepseek-v3", {"topk_method": "greedy"}, "topk_method = 'greedy'"),
    ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
    ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
    ("deepseek-v3", {"rope_interleave": None}, "rope_interleave = None"),
    ("deepseek-v3", {"rope_interleave": False}, None),
    ("deepseek-v2", {"topk_method": "greedy", "n_group": 4, "topk_group": 1}, None),
    ("deepseek-v2", {"num_key_value_heads": None}, None),
    ("deepseek-v2", {"mlp_bias": True}, "mlp_bias = True"),
    ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob = True"),
    ("gpt-oss", {"experts_per_token": 1}, "num_experts_per_tok = 2 and experts_per_token = 1"),
    ("gpt-oss", {"layer_types": []}, "layer_types = []"),
    ("gpt-oss", {"layer_types": None}, None),
    ("gpt-oss", {"layer_types": ["full_attention"] * 4}, None),
    ("gpt-oss", {"sliding_window": None}, "sliding_window = None"),
    ("gpt-oss", {"swiglu_limit": 5.0}, "swiglu_limit = 5.0"),
    ("llama4", {"no_rope_layer_interval": 2}, "no_rope_layers = ["),
    ("llama4", {"no_rope_layers": []}, None),
    ("llama4", {"no_rope_layers": [True, True, True, False]}, "no_rope_layers = ["),
    ("llama4", {"moe_layers": []}, "moe_layers = []"),
    ("llama4", {"layer_types": ["full_attention"] * 4}, "layer_types = ["),
    ("llama4", {"attention_chunk_size": None}, "attention_chunk_size = None"),
    ("llama4", {"interleave_moe_layer_step": 1}, "moe_layers = ["),
    ("llama4", {"is_causal": False}, "is_causal = False"),
    ("gpt-oss", {"is_causal": False}, "is_causal = False"),
    ("mixtral", {"is_causal": True}, None),
    ("LlamaConfig", {"is_causal": False}, "is_causal = False"),
    ("LlamaConfig", {"mlp_bias": True}, "mlp_bias = True"),
    ("LlamaConfig", {"attention_bias": 1}, "attention_bias = 1"),
    ("LlamaConfig", {"model_type": "mistral"}, "model_type = 'mistral'"),
    ("MistralConfig", {"sliding_window": 8, "use_sliding_window": False}, "sliding_window = 8"),
    ("Qwen3Config", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window = 8"),
    ("Qwen3Config", {"sliding_window": 8}, None),
    ("Qwen3Config", {"layer_types": ["sliding_attention"] * 2}, "layer_types = ["),
]  # fmt: skip


@pytest.mark.parametrize("name", [*SEVEN, *DENSE])
def test_other_pairs(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    for of, keys, expected in OTHERS:
        if of == name:
            raw = json.loads((folders[name] / "config.json").read_text()) | keys
            told = follow_or_refuse(folders[name], raw, tmp_path / "hf")
            assert (expected or "") in told and bool(told) == (expected is not None), (keys, told)


def test_mistral_without_a_window_key_has_one(folders: dict[str, Path], tmp_path: Path) -> None:
    raw = json.loads((folders["MistralConfig"] / "config.json").read_text())
    del raw["sliding_window"]
    told = follow_or_refuse(folders["MistralConfig"], raw, tmp_path / "hf")
    assert "sliding_window = 4096 (its default" in told


def test_a_language_model_within_another(tmp_path: Path) -> None:
    """Keys inside and outside of text_config."""
    decoder = random_decoder(FAMILIES["llama4"])
    state = decoder.state_dict()
    write_tensors(tmp_path, decoder.config, lambda n, i: state[n][i], torch.float32)
    text = hf_config(decoder.config, max_positions=64, eos_token_id=0, dtype="float32")
    outer: Config = {
        "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4",
        "text_config": text, "tie_word_embeddings": False,
    }  # fmt: skip

    def told(raw: Config) -> str:
        with_config(tmp_path, raw, tmp_path.parent / "other")
        try:
            our_logits(tmp_path.parent / "other")
        except ValueError as error:
            return str(error)
        return ""

    assert told(outer) == ""
    assert "tie_word_embeddings = True, but text_config.tie_word_embeddings = False" in told(
        outer | {"tie_word_embeddings": True}
    )
    bare = {k: v for k, v in text.items() if k != "tie_word_embeddings"}
    assert "text_config.tie_word_embeddings = False" in told(
        outer | {"tie_word_embeddings": True, "text_config": bare}
    )
    assert told(outer | {"text_config": bare}) == ""
    assert "quantization_config = None" in told(
        outer | {"quantization_config": None, "text_config": text | {"quantization_config": {}}}
    )
    assert "text_config: model_type = 'llama'" in told(
        outer | {"text_config": text | {"model_type": "llama"}}
    )
    assert "model_type = 'llama4_text'" in told(outer | {"model_type": "llama4_text"})
