"""Export parity: transformers loads what we write, misses nothing, and computes the same."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from configs.loader import load
from configs.schema import ConfigError, Model
from models.attention import DocumentAttention
from models.decoder import Decoder
from models.hf import architecture, from_hf_config, hf_config, hf_tensors
from models.hf_files import read_model, write_tensors
from models.init import initialise
from models.moe import routers
from tests.runs import TINY, run

FAMILIES: dict[str, dict[str, Any]] = {
    "glm4": {},
    "glm4-no-shared-untied": {
        "tie_embeddings": False,
        "qk_norm": False,
        "moe": {"n_shared_experts": 0, "route_scale": 1.7, "norm_top_k": False},
    },
    "qwen3": {
        "n_dense_layers": 0,
        "moe": {"score_func": "softmax", "bias_update_rate": 0.0, "n_shared_experts": 0},
    },
}
COMPARE = """
import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model, info = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True
)
wrong = {key: sorted(map(str, value)) for key, value in info.items() if value}
ours = load_file(folder + "/ours.check")
with torch.no_grad():
    theirs = model(ours["tokens"]).logits
print(json.dumps({
    "class": type(model).__name__, "wrong": wrong,
    "error": float((theirs - ours["logits"]).norm() / theirs.norm()),
}))
"""


def family(name: str) -> Model:
    model, options = load(TINY).model, dict(FAMILIES[name])
    moe = replace(model.moe, **options.pop("moe", {}))
    return replace(model, moe=moe, **options)


def random_decoder(model: Model) -> Decoder:
    decoder = Decoder(replace(model, init_std=0.2))
    initialise(decoder, decoder.config, seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        for router in routers(decoder):
            if model.moe.bias_update_rate:
                router.bias_E.add_(torch.randn(router.bias_E.shape, generator=generator), alpha=0.1)
    return decoder.eval()


def write(decoder: Decoder, folder: Path, shard_bytes: int = 40_000) -> None:
    state = decoder.state_dict()
    write_tensors(
        folder, decoder.config, lambda name, i: state[name][i], torch.float32, shard_bytes
    )
    described = hf_config(decoder.config, max_positions=64, eos_token_id=0, dtype="float32")
    (folder / "config.json").write_text(json.dumps(described))


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    decoder = random_decoder(family(name))
    write(decoder, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = torch.randint(0, 320, (2, 37), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(37).expand(2, 37)
    with torch.no_grad():
        logits = decoder(tokens.reshape(-1), positions.reshape(-1), DocumentAttention(positions))
    save_file({"tokens": tokens, "logits": logits.view(2, 37, -1)}, tmp_path / "ours.check")
    done = run("-P", "-c", COMPARE, tmp_path)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["wrong"] == {}
    assert result["class"] == architecture(decoder.config)
    assert result["error"] < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_reading_back_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    decoder = random_decoder(family(name))
    write(decoder, tmp_path)
    again = read_model(tmp_path, torch.float32)
    for key, value in decoder.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    half = read_model(tmp_path, torch.bfloat16)
    assert all(router.bias_E.dtype == torch.float32 for router in routers(half))
    assert all(router.weight.dtype == torch.bfloat16 for router in routers(half))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_element_of_ours_is_exported_exactly_once(name: str) -> None:
    model = family(name)
    decoder = Decoder(model)
    seen = {key: torch.zeros_like(value) for key, value in decoder.state_dict().items()}
    for tensor in hf_tensors(model):
        if tensor.ours is not None:
            assert seen[tensor.ours][tensor.index].shape == tensor.shape
            seen[tensor.ours][tensor.index] += 1
    for key, count in seen.items():
        exported = not (key.endswith("bias_E") and model.moe.score_func == "softmax")
        assert count.eq(1 if exported else 0).all(), key


@pytest.mark.parametrize("name", FAMILIES)
def test_config_round_trip(name: str) -> None:
    model = family(name)
    described = hf_config(model, max_positions=64, eos_token_id=0, dtype="float32")
    again = from_hf_config(json.loads(json.dumps(described)), "config.json")
    shared = max(model.moe.n_shared_experts, 1) if architecture(model)[0] == "G" else 0
    moe = replace(model.moe, n_shared_experts=shared, bias_update_rate=again.moe.bias_update_rate)
    assert again == replace(model, moe=moe, d_ff=model.d_ff if model.n_dense_layers else 0)


def test_what_cannot_be_exported_says_why() -> None:
    model = family("qwen3")
    with pytest.raises(ConfigError, match="qk_norm = false"):
        architecture(replace(model, qk_norm=False))
    with pytest.raises(ConfigError, match="n_shared_experts"):
        architecture(replace(model, moe=replace(model.moe, n_shared_experts=1)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures = 'LlamaForCausalLM'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"hidden_size": None}, "hidden_size"),
        ({"n_group": 4}, "n_group = 4"),
        ({"num_attention_heads": 3}, "n_kv_heads"),
        ({"hidden_size": "wide"}, "hidden_size = 'wide': wrong type"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers = 1.5: wrong type"),
        ({"rope_parameters": [1]}, "rope_parameters = "),
        ({"architectures": 5}, "architectures = 5"),
        ({"vocab_size": 10**15}, "vocab_size = 1000000000000000: must lie between"),
        ({"n_routed_experts": 10**6}, "n_routed_experts = 1000000: must lie between"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1: must be true or false"),
    ],
    ids=str,
)
def test_a_config_we_cannot_run_is_refused(change: dict[str, Any], expected: str) -> None:
    described = hf_config(family("glm4"), max_positions=64, eos_token_id=0, dtype="float32")
    for key, value in change.items():
        if value is None:
            del described[key]
        else:
            described[key] = value
    with pytest.raises(ConfigError, match=expected):
        from_hf_config(described, "config.json")


def test_a_damaged_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    decoder = random_decoder(family("glm4"))
    write(decoder, tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    content = shards[0].read_bytes()
    for damage, expected in [
        (lambda: shards[0].unlink(), "tensors missing, the first is"),
        (lambda: shards[0].write_bytes(content[:100]), "unreadable safetensors"),
        (
            lambda: save_file({"stray": torch.zeros(1)}, tmp_path / "z.safetensors"),
            "tensors unexpected, the first is stray",
        ),
    ]:
        damage()
        with pytest.raises(ConfigError, match=expected):
            read_model(tmp_path, torch.float32)
        shards[0].write_bytes(content)
    (tmp_path / "z.safetensors").unlink()
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"vocab_size": 321}))
    with pytest.raises(ConfigError, match="has shape"):
        read_model(tmp_path, torch.float32)
    for shard in shards:
        shard.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"pickles such as pytorch_model\.bin are not read"):
        read_model(tmp_path, torch.float32)
    with pytest.raises(ConfigError, match="no such folder"):
        read_model(tmp_path / "absent", torch.float32)
