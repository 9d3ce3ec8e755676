"""Export parity: transformers loads our exports, finds every tensor, and computes the same
results."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import UserError
from configs.model import ModelConfig
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.hf.files import read_model, write_tensors
from models.hf.table import architecture, from_hf_config, hf_config, hf_tensors
from models.init import initialize
from models.router import routers
from tests.models.families import FAMILIES
from tests.runs import run

COMPARE = """
import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model, info = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager",
    experts_implementation="eager",
)
model.save_pretrained(folder + "/again")
given = load_file(folder + "/given.check")
logits = model(given["tokens"]).logits
loss = torch.nn.functional.cross_entropy(
    logits[:, :-1].flatten(0, 1), given["tokens"][:, 1:].flatten(), reduction="sum"
)
loss.backward()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
model.save_pretrained(folder + "/gradients")  # by the names of the checkpoint, not of the modules
from safetensors.torch import save_file
save_file({"logits": logits.detach()}, folder + "/theirs.check")
print(json.dumps({
    "class": type(model).__name__,
    "wrong": {key: sorted(map(str, value)) for key, value in info.items() if value},
}))
"""


def random_decoder(model: ModelConfig) -> Decoder:
    decoder = Decoder(replace(model, init_std=0.2))
    initialize(decoder, decoder.config, seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith(("norm.weight", ".bias", ".b13", ".b2", ".sinks")):
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


def read_all(folder: Path) -> dict[str, Tensor]:
    return {k: v for p in sorted(folder.glob("*.safetensors")) for k, v in load_file(p).items()}


def main_names(model: ModelConfig) -> list[str]:
    """Names of all exported tensors except those of MTP modules."""
    return [t.name for t in hf_tensors(replace(model, mtp_depth=0))]


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


WITH_MTP = [
    pytest.param(name, marks=[pytest.mark.slow] if f"{name}-mtp" in FAMILIES else [])
    for name in FAMILIES
]
"""By default without those whose tensors are a part of those of the same model with MTP modules;
test_hf_pairs.py and test_hf_defaults.py compare their logits with those of transformers."""


@pytest.mark.parametrize("name", WITH_MTP)
def test_transformers_agrees_in_logits_and_every_gradient(name: str, tmp_path: Path) -> None:
    """Sequences are longer than window, chunk and original RoPE length. Tolerances: 1e-4 of its
    norm for a gradient (fp32, other order of summation), 1e-5 for logits."""
    decoder = random_decoder(FAMILIES[name])
    write(decoder, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = torch.randint(0, 96, (2, 37), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, tmp_path / "given.check")
    result = json.loads(run("-P", "-c", COMPARE, tmp_path).stdout.splitlines()[-1])
    # transformers has no MTP modules; it ignores them silently only at the published layer number
    model = decoder.config
    unexpected = result["wrong"].pop("unexpected_keys", [])
    beyond = {str(layer) for layer in range(model.n_layers, model.n_layers + model.mtp_depth)}
    assert {key.split(".")[2] for key in unexpected} == beyond
    assert result == {"class": architecture(model), "wrong": {}}

    positions = torch.arange(37).expand(2, 37)
    logits = decoder(tokens.reshape(-1), positions.reshape(-1), DocumentAttention(positions))
    logits = logits.view(2, 37, -1)
    assert relative(logits, load_file(tmp_path / "theirs.check")["logits"]) < 1e-5
    F.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    ).backward()
    ours = {n: p for n, p in decoder.named_parameters() if not n.startswith("mtp.")}
    theirs = read_all(tmp_path / "gradients")
    exported, again = read_all(tmp_path), read_all(tmp_path / "again")
    compared = 0
    for t in hf_tensors(replace(model, mtp_depth=0)):
        if t.is_copy:  # the head of a tied model, which transformers does not write again
            continue
        assert torch.equal(exported[t.name], again[t.name]), f"{t.name} is not the same bits"
        if t.ours in ours:
            gradient = ours[t.ours].grad
            assert gradient is not None and gradient.norm() > 0, t.ours
            error = relative(t.to_hf(gradient[t.index]), theirs[t.name])
            assert error < 1e-4, f"{t.name}: {error:.1e}"
            compared += t.to_hf(gradient[t.index]).numel()
    assert compared == sum(p.numel() for p in ours.values()), "every element was compared"
    assert set(main_names(model)) - {"lm_head.weight"} <= again.keys()
    assert exported.keys() == {t.name for t in hf_tensors(model)}


@pytest.mark.parametrize("name", WITH_MTP)
def test_reading_back_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    decoder = random_decoder(FAMILIES[name])
    write(decoder, tmp_path)
    again = read_model(tmp_path, torch.float32, mtp=True)
    for key, value in decoder.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    served = read_model(tmp_path, torch.float32)
    main = {k: v for k, v in again.state_dict().items() if not k.startswith("mtp.")}
    assert served.state_dict().keys() == main.keys()
    assert all(torch.equal(served.state_dict()[k], v) for k, v in main.items())
    half = read_model(tmp_path, torch.bfloat16)
    assert all(router.bias_E.dtype == torch.float32 for router in routers(half))
    assert all(router.weight.dtype == torch.bfloat16 for router in routers(half))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_element_of_ours_is_exported_exactly_once(name: str) -> None:
    model = FAMILIES[name]
    seen = {key: torch.zeros_like(value) for key, value in Decoder(model).state_dict().items()}
    for t in hf_tensors(model):
        if t.ours is not None and not t.is_copy:
            part = seen[t.ours][t.index]
            assert t.to_hf(part).shape == t.shape
            part += 1
    for key, count in seen.items():
        biased = model.moe.score_func == "sigmoid" and model.moe.weight_on == "output"
        assert count.eq(1 if biased or not key.endswith("bias_E") else 0).all(), key


@pytest.mark.parametrize("name", FAMILIES)
def test_config_round_trip(name: str) -> None:
    model = FAMILIES[name]
    described = hf_config(model, max_positions=64, eos_token_id=0, dtype="float32")
    again = from_hf_config(json.loads(json.dumps(described)), "config.json")
    assert again == model


def test_what_cannot_be_exported_says_why() -> None:
    qwen3 = FAMILIES["qwen3"]
    shared = replace(qwen3, moe=replace(qwen3.moe, n_shared_experts=1))
    with pytest.raises(UserError, match=r"Qwen3Moe.*needs another model\.moe\.n_shared_experts"):
        architecture(shared)
    sinks = replace(qwen3, attention=replace(qwen3.attention, sinks=True))
    with pytest.raises(UserError, match=r"model\.attention\.sinks"):
        architecture(sinks)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures = ['LlamaForCausalLM']"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "partial_rotary_factor": 1.0}},
            "rope_type = 'dynamic'",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "partial_rotary_factor": 1.0}},
            "'factor' is missing",
        ),
        ({"hidden_size": None}, "hidden_size"),
        ({"n_group": 3}, "n_group = 3"),
        ({"num_attention_heads": 3}, "num_key_value_heads = 2"),
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
    described = hf_config(FAMILIES["glm4"], max_positions=64, eos_token_id=0, dtype="float32")
    for key, value in change.items():
        if value is None:
            del described[key]
        else:
            described[key] = value
    with pytest.raises(UserError, match=re.escape(expected)):
        from_hf_config(described, "config.json")


def test_a_damaged_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    decoder = random_decoder(FAMILIES["glm4"])
    write(decoder, tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    content = shards[0].read_bytes()
    for damage, expected in [
        (lambda: shards[0].unlink(), "tensors missing, the first is"),
        (lambda: shards[0].write_bytes(content[:100]), "unreadable safetensors"),
        (
            lambda: save_file({"stray": torch.zeros(1)}, tmp_path / "z.safetensors"),
            "omits 1 tensors, the first is stray of z.safetensors",
        ),
    ]:
        damage()
        with pytest.raises(UserError, match=re.escape(expected)):
            read_model(tmp_path, torch.float32)
        shards[0].write_bytes(content)
    (tmp_path / "z.safetensors").unlink()
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"vocab_size": 321}))
    with pytest.raises(UserError, match="has shape"):
        read_model(tmp_path, torch.float32)
    for shard in shards:
        shard.unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"; pytorch_model\.bin .* convert it to safetensors"):
        read_model(tmp_path, torch.float32)
    with pytest.raises(UserError, match="no such folder"):
        read_model(tmp_path / "absent", torch.float32)


def test_mtp_modules_have_the_names_of_the_published_weights(tmp_path: Path) -> None:
    """MTP modules as in DeepSeek-V3: one layer more, with copies of embedding and head."""
    model = replace(FAMILIES["deepseek-v3-mtp"], mtp_depth=1)
    decoder = random_decoder(model)
    write(decoder, tmp_path)
    tensors, layer = read_all(tmp_path), "model.layers.3."
    own = {n.removeprefix(layer) for n in tensors if n.startswith(layer)}
    last = {n.removeprefix("model.layers.2.") for n in tensors if n.startswith("model.layers.2.")}
    norms = {"enorm.weight", "hnorm.weight", "shared_head.norm.weight"}
    shared = {"embed_tokens.weight", "shared_head.head.weight"}
    assert own == last | norms | shared | {"eh_proj.weight"}
    assert tensors[f"{layer}eh_proj.weight"].shape == (32, 64)
    assert torch.equal(tensors[f"{layer}embed_tokens.weight"], decoder.embed.weight)
    assert decoder.head is not None
    assert torch.equal(tensors[f"{layer}shared_head.head.weight"], decoder.head.weight)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["num_nextn_predict_layers"] == 1 and described["num_hidden_layers"] == 3


def test_a_folder_without_its_mtp_modules_is_a_model_without_them(tmp_path: Path) -> None:
    """As saved by transformers, which drops MTP modules but keeps their number in config.json."""
    model = FAMILIES["deepseek-v3-mtp"]
    decoder = random_decoder(model)
    write(decoder, tmp_path, shard_bytes=10**9)
    (written,) = tmp_path.glob("*.safetensors")
    (tmp_path / "model.safetensors.index.json").unlink()
    file = written.rename(tmp_path / "model.safetensors")
    kept = {n: v for n, v in load_file(file).items() if n in main_names(model)}
    norm = kept["model.norm.weight"].clone()
    save_file(kept, file)
    assert torch.equal(read_model(tmp_path, torch.float32).embed.weight, decoder.embed.weight)
    assert read_model(tmp_path, torch.float32, mtp=True).config.mtp_depth == 0
    some = kept | {"model.layers.3.enorm.weight": norm}
    save_file(some, file)
    with pytest.raises(UserError, match=r"tensors missing, the first is model\.layers\.3\."):
        read_model(tmp_path, torch.float32, mtp=True)


def test_other_families_refuse_mtp() -> None:
    with pytest.raises(UserError, match=r"model\.mtp_depth"):
        architecture(replace(FAMILIES["qwen3"], mtp_depth=1))
