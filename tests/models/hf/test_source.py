"""Folders from other programs: published configs, and every kind of invalid content."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from configs.loader import load
from configs.model import ModelConfig, RopeConfig
from models.hf.checkpoint import HFCheckpoint
from models.hf.files import read_config, read_model
from models.hf.folder import INDEX
from models.hf.table import architecture, from_hf_config, hf_config
from tests.models.families import FAMILIES
from tests.models.hf.test_hf import random_decoder, read_all, write
from tests.runs import ROOT, run

COMMON = {"hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "type": "yarn",
        "original_max_position_embeddings": 4096}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {  # the keys of the published files that matter here
    "qwen3_30b_a3b": COMMON | {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "head_dim": 128,
        "decoder_sparse_step": 1, "hidden_size": 2048, "intermediate_size": 6144,
        "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "mixtral_8x7b": COMMON | {
        "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32000,
    },
    "deepseek_v3_671b": COMMON | {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "ep_size": 1,
        "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432,
        "kv_lora_rank": 512, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
        "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
        "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
        "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "rope_theta": 10000,
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_group": 4,
        "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
        "initializer_range": 0.006,
    },
    "deepseek_v2_lite": COMMON | {
        "architectures": ["DeepseekV2ForCausalLM"], "first_k_dense_replace": 1,
        "hidden_size": 2048, "intermediate_size": 10944, "kv_lora_rank": 512,
        "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
        "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
        "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06, "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax",
        "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400,
    },
    "gpt_oss_20b": COMMON | {
        "architectures": ["GptOssForCausalLM"], "attention_bias": True, "experts_per_token": 4,
        "head_dim": 64, "hidden_size": 2880, "initial_context_length": 4096,
        "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
        "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 8, "num_local_experts": 32, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
            "original_max_position_embeddings": 4096, "truncate": False,
        },
        "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "vocab_size": 201088,
    },
    "llama4_scout": {
        "architectures": ["Llama4ForConditionalGeneration"], "tie_word_embeddings": False,
        "vision_config": {}, "text_config": {
            "attention_bias": False, "attention_chunk_size": 8192, "attn_scale": 0.1,
            "attn_temperature_tuning": 4, "floor_scale": 8192, "head_dim": 128,
            "hidden_act": "silu", "hidden_size": 5120, "interleave_moe_layer_step": 1,
            "intermediate_size": 8192, "intermediate_size_mlp": 16384, "no_rope_layers": [],
            "moe_layers": list(range(48)), "num_attention_heads": 40, "num_experts_per_tok": 1,
            "num_hidden_layers": 48, "num_key_value_heads": 8, "num_local_experts": 16,
            "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "use_qk_norm": True,
            "vocab_size": 202048, "rope_scaling": {
                "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_the_shipped_experiments(name: str) -> None:
    """All settings except RoPE scaling, which is added after the pre-training that our
    experiments describe, and the factors of the balance losses, which not every report states
    in config.json."""
    found = from_hf_config(PUBLISHED[name], "config.json")
    shipped = load(ROOT / "configs" / f"{name}.toml").model
    kv = found.attention.n_kv_heads
    shipped = replace(shipped, attention=replace(shipped.attention, n_kv_heads=kv))
    plain = RopeConfig(theta=found.rope.theta, interleaved=found.rope.interleaved)
    # DeepSeek-V2-Lite was initialized with 0.006 (its paper); its config.json has 0.02

    def bare(model: ModelConfig) -> ModelConfig:
        moe = replace(model.moe, seq_aux_loss_coef=0.0, global_aux_loss_coef=0.0)
        return replace(model, rope=plain, init_std=1, moe=moe)

    assert bare(found) == bare(shipped)
    assert (found.rope.theta, found.rope.interleaved) == (
        shipped.rope.theta, shipped.rope.interleaved,
    )  # fmt: skip
    assert (found.rope.scaling == "none") == (name in ("qwen3_30b_a3b", "mixtral_8x7b"))


@pytest.mark.parametrize("name", FAMILIES)
def test_old_keys_alone_and_new_keys_alone_give_the_same_model(name: str) -> None:
    """An export has both keys; a reader of either one must read the same value."""
    both = hf_config(FAMILIES[name], max_positions=64, eos_token_id=0, dtype="float32")
    for pair in (("rope_theta", "rope_parameters"), ("dtype", "torch_dtype")):
        assert all(key in both for key in pair), pair
    assert both["rope_theta"] == both["rope_parameters"]["rope_theta"]
    counts = {"num_experts", "n_routed_experts", "num_local_experts"} & both.keys()
    assert "num_local_experts" in counts and len(counts) == 2
    assert len({both[key] for key in counts}) == 1
    model = from_hf_config(both, "config.json")
    new = {k: v for k, v in both.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    old = {k: v for k, v in both.items() if k not in ("rope_parameters", "dtype")}
    if "partial_rotary_factor" in both["rope_parameters"]:
        old["partial_rotary_factor"] = 1.0
    followed = {"deepseek-v2": {"n_routed_experts"}, "llama4": {"num_local_experts"}}
    for spelling in followed.get(name, counts):  # by transformers; the other is for other readers
        for config in (new, old):
            given = {k: v for k, v in config.items() if k not in counts - {spelling}}
            assert from_hf_config(given, "config.json") == model, spelling
    first, second = sorted(counts)
    with pytest.raises(UserError, match=rf"{first} = .* and {second} = |{second} = .* and"):
        from_hf_config(both | {first: 4096}, "config.json")
    with pytest.raises(UserError, match=r"rope_theta = 5, but rope_\w+\.rope_theta = "):
        from_hf_config(both | {"rope_theta": 5}, "config.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A DeepSeek-V3 in several shards, untied."""
    path = tmp_path / "hf"
    path.mkdir()
    write(random_decoder(FAMILIES["deepseek-v3"]), path)
    return path


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refused(folder: Path, *expected: str) -> None:
    with pytest.raises(UserError) as error:
        read_model(folder, torch.float32)
    for part in expected:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> str:
    """Change a shard's tensors and the index with them; returns the first name."""
    tensors = load_file(path)
    first = min(tensors)
    change(tensors)
    save_file(tensors, path)

    def listed(index: dict[str, Any]) -> None:
        kept = {k: v for k, v in index["weight_map"].items() if v != path.name}
        index["weight_map"] = kept | dict.fromkeys(tensors, path.name)

    edit_json(path.parent / INDEX, listed)
    return first


def test_missing_unexpected_misshapen(folder: Path) -> None:
    path = shards(folder)[1]
    whole, index = path.read_bytes(), (folder / INDEX).read_bytes()

    def restore() -> None:
        path.write_bytes(whole)
        (folder / INDEX).write_bytes(index)

    gone = rewrite(path, lambda t: t.pop(min(t)))
    refused(folder, str(folder), f"1 tensors missing, the first is {gone}")
    restore()
    stray = "model.layers.3.stray.weight"  # one after the last layer
    rewrite(path, lambda t: t.update({stray: torch.zeros(2)}))
    refused(folder, f"1 tensors unexpected, the first is {stray}")
    restore()
    name = rewrite(path, lambda t: t.update({min(t): torch.zeros(3, 5)}))
    refused(folder, str(path), name, "has shape [3, 5], config.json asks for")
    restore()
    name = rewrite(path, lambda t: t.update({min(t): t[min(t)].double()}))
    refused(folder, str(path), name, "has dtype F64")
    restore()
    rewrite(shards(folder)[-1], lambda t: t.pop("lm_head.weight"))
    refused(folder, "lm_head.weight is missing", "tie_word_embeddings")


def test_index_and_files(folder: Path, tmp_path: Path) -> None:
    index = folder / INDEX
    good = index.read_text()
    for damage, expected in (
        ("{", "not valid JSON"),
        ("[]", "must hold one JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"weight_map": {}}', "weight_map: must name the file of every tensor"),
        ('{"weight_map": {"a": 3}}', "a = 3: must be a *.safetensors file"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "must be a *.safetensors file"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "must be a file in this folder"),
        ('{"weight_map": {"a": "/etc/a.safetensors"}}', "must be a file in this folder"),
        ('{"weight_map": {"a": "b/../../a.safetensors"}}', "must be a file in this folder"),
        ('{"weight_map": {"a": "x\\u0000.safetensors"}}', "must be a file in this folder"),
    ):
        index.write_text(damage)
        refused(folder, str(index), expected)
    index.write_text(good)
    edit_json(
        index, lambda i: i["weight_map"].update({"model.norm.weight": shards(folder)[0].name})
    )
    refused(folder, str(index), f"model.norm.weight is not in {shards(folder)[0].name}")
    index.unlink()
    refused(folder, str(index), "missing, but the weights are in shards")
    index.write_text(good)
    shard = shards(folder)[2]
    shard.rename(tmp_path / "elsewhere.safetensors")
    refused(folder, str(shard), "this shard is missing", INDEX)
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    refused(folder, shard.name, "must be a file in this folder")
    shard.unlink()
    (tmp_path / "elsewhere.safetensors").rename(shard)
    twice = folder / "z.safetensors"
    save_file({"model.norm.weight": torch.zeros(32)}, twice)
    refused(folder, str(twice), "model.norm.weight is also in")
    twice.rename(folder / "consolidated.safetensors")  # Mistral's own copy, not opened
    model, raw = read_config(folder)
    assert list(HFCheckpoint(folder, model, raw).left_out) == ["file consolidated.safetensors"]


def test_files_that_are_cut_off_or_lie(folder: Path) -> None:
    path = shards(folder)[0]
    whole = path.read_bytes()
    n = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + n])
    name = next(key for key in header if key != "__metadata__")

    def lie(change: Callable[[dict[str, Any]], object]) -> bytes:
        changed = json.loads(json.dumps(header))
        change(changed[name])
        text = json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + n :]

    huge = (2**62).to_bytes(8, "little")
    for content in (
        whole[:-1], whole[: 8 + n], whole[:5], b"", whole + b"x", huge + whole[8:],
        lie(lambda t: t.update(shape=[2**40, 2**20])),
        lie(lambda t: t.update(data_offsets=[0, 2**50])),
        lie(lambda t: t.update(dtype="OBJECT")),
    ):  # fmt: skip
        path.write_bytes(content)
        refused(folder, str(path), "unreadable safetensors file")


def test_only_safetensors_inside_the_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    refused(folder, "config.json leads out of the folder")
    os.remove(folder / "config.json")
    refused(folder, "config.json: no such file")


def test_what_may_be_left_out(folder: Path) -> None:
    """An MTP layer is accepted if config.json declares it, RoPE frequencies of old files are
    ignored; nothing else is."""
    mtp = {"model.layers.3.eh_proj.weight": torch.zeros(4, 4)}
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    rewrite(shards(folder)[0], lambda t: t.update(mtp | old))
    refused(folder, "unexpected, the first is model.layers.3.eh_proj.weight")
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):
        edit_json(folder / "config.json", lambda c: c.pop("num_nextn_predict_layers", None))
        edit_json(folder / "config.json", lambda c, key=key: c.update({key: 1}))  # type: ignore[misc]
        model, raw = read_config(folder)
        left_out = HFCheckpoint(folder, replace(model, mtp_depth=0), raw).left_out
        assert left_out["multi-token prediction"] == 1 and left_out.total() == 2
        edit_json(folder / "config.json", lambda c: c.pop("num_mtp_layers", None))


def test_tied_embeddings(tmp_path: Path) -> None:
    """A tied model may have a head tensor if it equals the embedding."""
    write(random_decoder(replace(FAMILIES["qwen3"], tie_embeddings=True)), tmp_path)
    embedding = read_all(tmp_path)["model.embed_tokens.weight"]
    rewrite(shards(tmp_path)[-1], lambda t: t.update({"lm_head.weight": embedding.clone()}))
    assert read_model(tmp_path, torch.float32).head is None
    other = embedding.clone()
    other[7, 3] += 1
    rewrite(shards(tmp_path)[-1], lambda t: t.update({"lm_head.weight": other}))
    refused(tmp_path, "config.json: tie_word_embeddings = true, but lm_head.weight is another")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
        ({"rope_scaling": YARN | {"attention_factor": 2.0}}, "rope_scaling.attention_factor"),
        ({"rope_scaling": 3}, "rope_scaling = 3: must be an object"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ({"is_causal": False}, "is_causal = False: must be true"),
        ({"is_causal": None}, "is_causal = None: must be true"),
        ({"mtp_hidden_states_first": True}, "mtp_hidden_states_first = True: must be false"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights = 'other"),
        ({"fusion_config": {"x": True}}, "fusion_config = {'x': True}"),
        ({"architectures": ["LlamaForCausalLM"]}, "must be one of"),
        ({"architectures": ["Llama4ForConditionalGeneration"]}, "text_config = None"),
    ],
    ids=str,
)
def test_configs_we_cannot_run(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        from_hf_config(PUBLISHED["deepseek_v3_671b"] | change, "config.json")


WITH_IMAGES = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import Llama4Config, Llama4ForConditionalGeneration
folder = sys.argv[1]
text = json.load(open(folder + "/wanted.json"))
vision = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
              vision_output_dim=16, image_size=28, patch_size=14, projector_input_dim=16,
              projector_output_dim=16, pixel_shuffle_ratio=0.5)
config = Llama4Config(text_config=text, vision_config=vision)
torch.manual_seed(6)
model = Llama4ForConditionalGeneration(config)
with torch.no_grad():
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_(std=0.2)
model.save_pretrained(folder + "/hf", max_shard_size="40kB")
save_file({k: v.contiguous() for k, v in model.language_model.state_dict().items()},
          folder + "/theirs.check")
"""


def test_llama4_with_images(tmp_path: Path) -> None:
    """The published form: the language model has a name prefix, and its config is nested."""
    text = hf_config(FAMILIES["llama4"], max_positions=64, eos_token_id=0, dtype="float32")
    (tmp_path / "wanted.json").write_text(json.dumps(text))
    run("-P", "-c", WITH_IMAGES, tmp_path)
    model, raw = read_config(tmp_path / "hf")
    assert architecture(model) == "Llama4ForCausalLM"
    source = HFCheckpoint(tmp_path / "hf", model, raw)
    assert source.left_out["vision model"] > 5 and len(source.left_out) == 1
    theirs = load_file(tmp_path / "theirs.check")
    state = read_model(tmp_path / "hf", torch.float32).state_dict()
    assert {t.name for t in source.tensors} == theirs.keys()
    for t in source.tensors:
        assert t.ours is not None
        assert torch.equal(t.to_hf(state[t.ours][t.index]), theirs[t.name]), t.name
