"""Upcycling: the MoE computes the same as transformers' dense model, in Phalanx and once
exported."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from configs.errors import UserError
from configs.loader import from_dict, load, unflatten
from models import upcycle as recipes
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.hf.table import architecture
from models.router import routers
from models.upcycle import Recipe
from tests.runs import run
from train.checkpoint import checkpoint
from train.convert.dense_to_moe import upcycle_checkpoint
from train.convert.hf_export import export_hf

MAKE = """
import sys, torch, transformers as t
from safetensors.torch import save_file
torch.manual_seed(0)
sizes = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             initializer_range=0.2)
llama3 = dict(rope_type="llama3", rope_theta=5e4, factor=4.0, original_max_position_embeddings=16,
              low_freq_factor=1.0, high_freq_factor=4.0)
tokens = torch.randint(0, 300, (2, 37))
for name, make, more in (
    ("llama", t.LlamaConfig, dict(tie_word_embeddings=True, rope_parameters=llama3)),
    ("mistral", t.MistralConfig, dict(sliding_window=None, num_key_value_heads=4)),
    ("qwen3", t.Qwen3Config, dict(head_dim=16)),
):
    model = t.AutoModelForCausalLM.from_config(make(**sizes | more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        logits = model(tokens).logits
    folder = sys.argv[1] + "/" + name
    model.save_pretrained(folder, max_shard_size="40KB")
    save_file({"tokens": tokens, "logits": logits}, folder + "/theirs.check")
"""
READ = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
wrong = {}
for folder in sorted(Path(sys.argv[1]).glob("*/export")):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    wrong[folder.parent.name] = [type(model).__name__, *map(sorted, filter(None, info.values()))]
    tokens = load_file(sys.argv[2])["tokens"]
    with torch.no_grad():
        save_file({"logits": model(tokens).logits}, folder / "logits.check")
print(json.dumps(wrong))
"""
SAME: dict[str, tuple[str, Recipe, str]] = {
    "copies": ("llama", Recipe(copies=3), "Mixtral"),  # tied
    "one-expert": ("mistral", Recipe(copies=1), "Mixtral"),  # untied
    "pieces": ("mistral", Recipe(copies=2, granularity=4), "Mixtral"),
    "odd-pieces": ("llama", Recipe(copies=3, granularity=3, top_k=6), "Mixtral"),
    "first-layer-dense": ("qwen3", Recipe(copies=2, granularity=2, dense_layers=1), "Qwen3Moe"),
    "shared-piece": ("llama", Recipe(copies=2, granularity=4, shared=1), "Glm4Moe"),
    "shared-copy": ("mistral", Recipe(copies=3, shared=1), "Glm4Moe"),
    "shared-whole": ("qwen3", Recipe(copies=2, granularity=2, shared=2), "Glm4Moe"),
    "sigmoid": ("llama", Recipe(copies=2, granularity=2, dense_layers=2), "Glm4Moe"),
    "all-dense": ("llama", Recipe(dense_layers=3), "Glm4Moe"),
    "all-visited": ("qwen3", Recipe(copies=2, top_k=2, norm_top_k=False), "Qwen3Moe"),
}
CHANGED = {
    "noise": (Recipe(copies=2, noise=0.05), "noise = 0.05 moves the experts"),
    "some-pieces": (Recipe(copies=2, granularity=4, top_k=2), "no multiple of the 4 pieces"),
    "not-normalised": (Recipe(norm_top_k=False), "do not add up to 1"),
}


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def byte_tokenizer(folder: Path) -> None:
    names = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def logits_of(run_folder: Path, tokens: Tensor) -> Tensor:
    """Our logits of the newest checkpoint."""
    decoder = decoder_of(run_folder)
    length = tokens.shape[1]
    positions = torch.arange(length).expand(len(tokens), length)
    with torch.no_grad():
        logits = decoder(tokens.reshape(-1), positions.reshape(-1), DocumentAttention(positions))
    return logits.view(*tokens.shape, -1)


def decoder_of(run_folder: Path) -> Decoder:
    manifest = checkpoint.read_manifest(checkpoint.find(run_folder))
    checkpoint.verify_files(manifest)
    decoder = Decoder(from_dict(unflatten(manifest.config), "manifest").model).eval()
    state = decoder.state_dict(keep_vars=True)
    assert {f"model.{name}" for name in state} == manifest.boxes.keys()
    checkpoint.load(manifest, {f"model.{name}": tensor for name, tensor in state.items()})
    return decoder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dense model of every architecture, with its logits, written by transformers."""
    folder = tmp_path_factory.mktemp("dense")
    run("-P", "-c", MAKE, folder)
    for name in ("llama", "mistral", "qwen3"):
        byte_tokenizer(folder / name)
        assert len(list((folder / name).glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def upcycled(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An MoE of every recipe in SAME, exported and run by transformers; returns the faults
    found."""
    folder = tmp_path_factory.mktemp("upcycled")
    for name, (source, recipe, family) in SAME.items():
        lines = upcycle_checkpoint(str(dense / source), folder / name, recipe, [])
        assert lines[-1] == f"export: {family}ForCausalLM"
        if name != "all-dense":
            assert any(line.startswith("function: that of the dense model (") for line in lines)
        export_hf(folder / name, None, torch.float32)
    done = run("-P", "-c", READ, folder, dense / "llama" / "theirs.check")
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SAME)
def test_the_function_is_that_of_the_dense_model(
    name: str, dense: Path, upcycled: tuple[Path, dict[str, Any]]
) -> None:
    """Tolerance 1e-5 of the logits' norm: fp32, three layers, other orders of summation."""
    folder, wrong = upcycled
    source, recipe, family = SAME[name]
    check = load_file(dense / source / "theirs.check")
    assert relative(logits_of(folder / name, check["tokens"]), check["logits"]) < 1e-5
    assert wrong[name] == [f"{family}ForCausalLM"], "nothing missing, unexpected or misshapen"
    exported = load_file(folder / name / "export" / "logits.check")["logits"]
    assert relative(exported, check["logits"]) < 1e-5
    model = decoder_of(folder / name).config
    assert architecture(model) == f"{family}ForCausalLM"
    assert sum(map(model.is_moe, range(3))) == 3 - recipe.dense_layers


@pytest.mark.parametrize("name", CHANGED)
def test_a_recipe_that_changes_the_function_says_so(name: str, dense: Path, tmp_path: Path) -> None:
    recipe, why = CHANGED[name]
    lines = upcycle_checkpoint(str(dense / "llama"), tmp_path / "out", recipe, [])
    said = next(line for line in lines if line.startswith("function:"))
    assert said.startswith("function: NOT that of the dense model") and why in said
    check = load_file(dense / "llama" / "theirs.check")
    assert relative(logits_of(tmp_path / "out", check["tokens"]), check["logits"]) > 1e-3


def test_a_claim_that_does_not_hold_is_not_made(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "_routed_scale", lambda recipe, moe: recipe.routed * 1.001)
    with pytest.raises(AssertionError, match=r"layers\.0\.ffn differs by"):
        upcycle_checkpoint(str(dense / "llama"), tmp_path / "out", Recipe(), [])
    assert not list(tmp_path.iterdir())


def test_what_does_not_learn_is_told_and_a_layer_of_zeros_is_no_error(
    dense: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    shutil.copytree(dense / "llama", folder)
    rewrite(folder, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].zero_())
    lines = upcycle_checkpoint(str(folder), tmp_path / "out", Recipe(top_k=1), [])
    assert any(line.startswith("router: learns nothing") for line in lines)
    assert any(line.startswith("function: that of the dense model (") for line in lines)


def test_every_token_visits_whole_copies_and_copies_share_the_load(
    upcycled: tuple[Path, dict[str, Any]],
) -> None:
    router = routers(decoder_of(upcycled[0] / "odd-pieces"))[1]
    x_TD = torch.randn(500, 32, generator=torch.Generator().manual_seed(1))
    ids_TK, weights_TK = router(x_TD)
    copies, pieces = ids_TK // 3, ids_TK % 3
    assert torch.equal(pieces.sort(1).values, torch.tensor([0, 0, 1, 1, 2, 2]).expand(500, 6))
    for t in range(500):
        assert torch.equal(copies[t].unique(return_counts=True)[1], torch.tensor([3, 3]))
    assert torch.allclose(weights_TK.sum(1), torch.ones(500))
    assert copies.flatten().bincount(minlength=3).min() > 300, "no copy of three is left out"


def test_noise_differs_between_experts_and_repeats_with_the_seed(
    dense: Path, tmp_path: Path
) -> None:
    recipe = Recipe(copies=3, noise=0.1)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        upcycle_checkpoint(str(dense / "llama"), tmp_path / name, recipe, [f"--run.seed={seed}"])
    a, b, c = (decoder_of(tmp_path / name).state_dict() for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    original = load_original(dense / "llama")["model.layers.1.mlp.gate_proj.weight"]
    w13 = a["layers.1.ffn.experts.w13"]
    assert not torch.equal(w13, c["layers.1.ffn.experts.w13"])
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(w13[first], w13[second])
    for expert in w13:  # 48 * 32 samples: the fraction is met within a few percent
        assert 0.09 < relative(expert[0], original) < 0.11


def load_original(folder: Path) -> dict[str, Tensor]:
    return {k: v for p in folder.glob("*.safetensors") for k, v in load_file(p).items()}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """The same weights in one file, with a change."""
    tensors = load_original(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_older_folders_are_read(dense: Path, tmp_path: Path) -> None:
    """bf16 weights, keys with default values left out, unused tensors left in."""
    folder = tmp_path / "mistral"
    shutil.copytree(dense / "mistral", folder)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    del config["tie_word_embeddings"]
    config["head_dim"] = None
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": rope["rope_theta"]}))

    def age(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.bfloat16()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    rewrite(folder, age)
    upcycle_checkpoint(str(folder), tmp_path / "out", Recipe(copies=2), [])
    state = decoder_of(tmp_path / "out").state_dict()
    original = load_original(dense / "mistral")
    assert torch.equal(state["head.weight"], original["lm_head.weight"].bfloat16().float())
    down = original["model.layers.2.mlp.down_proj.weight"].bfloat16().float()
    assert torch.equal(state["layers.2.ffn.experts.w2"], down.expand(2, -1, -1))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures = ['GPT2LMHeadModel']"),
        ({"architectures": "LlamaForCausalLM"}, "architectures = 'LlamaForCausalLM'"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map = "),
        ({"quantization_config": {"bits": 4}}, "quantization_config = "),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type = 'dynamic'"),
        ({"sliding_window": 16}, "sliding_window = 16"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"intermediate_size": 64}, "has shape [48, 32], config.json asks for [64, 32]"),
        ({"num_hidden_layers": 4}, "tensors missing, the first is model.layers.3."),
        ({"num_hidden_layers": 2}, "tensors unexpected, the first is model.layers.2."),
        ({"max_position_embeddings": "far"}, "max_position_embeddings = 'far'"),
    ],
    ids=str,
)
def test_a_folder_that_cannot_be_read_is_refused(
    change: dict[str, Any], expected: str, dense: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    shutil.copytree(dense / "llama", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=re.escape(expected)) as error:
        upcycle_checkpoint(str(folder), tmp_path / "out", Recipe(), [])
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"], "nothing is left behind"


def test_weights_that_cannot_be_read_are_refused(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(dense / "llama", folder)
    shards = sorted(folder.glob("*.safetensors"))
    whole = shards[0].read_bytes()
    shards[0].unlink()
    refuse(folder, tmp_path, "tensors missing, the first is")
    shards[0].write_bytes(whole[:-40])
    refuse(folder, tmp_path, "unreadable safetensors file")
    shards[0].write_bytes(whole)

    def quantize(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = torch.full((32,), float("nan"))

    rewrite(folder, quantize)
    refuse(folder, tmp_path, "model.norm.weight is torch.int8: quantized weights are not read")
    rewrite(folder, spoil)
    refuse(folder, tmp_path, "model.norm.weight holds values that are not finite")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse(folder, tmp_path, "pytorch_model.bin may hold pickles, which are never opened")
    refuse(tmp_path / "absent", tmp_path, "no such folder")
    refuse(tmp_path / "absent.gguf", tmp_path, "absent.gguf: no such file")
    (dense / "llama" / "tokenizer.json").rename(tmp_path / "kept")
    refuse(dense / "llama", tmp_path, "tokenizer.json: no such file")
    (tmp_path / "kept").rename(dense / "llama" / "tokenizer.json")


def refuse(source: Path, tmp_path: Path, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        upcycle_checkpoint(str(source), tmp_path / "out", Recipe(), [])
    assert not list(tmp_path.glob("*out*"))


def test_recipes_that_do_not_fit_are_refused(dense: Path, tmp_path: Path) -> None:
    source, out = str(dense / "llama"), tmp_path / "out"
    for make, overrides, expected in (
        (lambda: Recipe(router_std=0.0), [], "router_std = 0: all tokens would visit"),
        (lambda: Recipe(router_std=float("nan")), [], "router_std = nan"),
        (lambda: Recipe(granularity=2, shared=3), [], "shared = 3"),
        (lambda: Recipe(copies=2, top_k=3), [], "top_k = 3"),
        (lambda: Recipe(score_func="tanh"), [], "score_func = 'tanh': must be one of"),  # type: ignore[arg-type]
        (lambda: Recipe(granularity=5), [], "granularity = 5: must divide"),
        (lambda: Recipe(dense_layers=4), [], "dense_layers = 4: the model has n_layers = 3"),
        (lambda: Recipe(), ["--run.dir=/"], "run.dir = '/': leads to the root"),
        (lambda: Recipe(), ["--model.moe.top_k=3"], "model.moe.top_k: source and recipe decide"),
        (lambda: Recipe(), ["--train.stepps=1"], "train.steps"),
        (lambda: Recipe(), ["nonsense"], "nonsense: an override has the form"),
    ):
        with pytest.raises(UserError, match=re.escape(expected)):
            upcycle_checkpoint(source, out, make(), overrides)
        assert not list(tmp_path.iterdir())
    out.mkdir()
    with pytest.raises(UserError, match="out: exists"):
        upcycle_checkpoint(source, out, Recipe(), [])


@pytest.mark.slow
def test_training_goes_on_from_the_dense_loss(dense: Path, corpus: Path, tmp_path: Path) -> None:
    """With the commands: equal held-out loss before training, a lower one after, equal to the
    trainer's."""
    data = [
        f"--data.source={corpus}",
        f"--data.cache_dir={tmp_path / 'cache'}",
        "--data.seq_len=32",
        "--precision.recipe=fp32",
        "--validation.sequences=16",
    ]
    losses = {}
    for name, words in (
        ("moe", ["--copies", "2", "--granularity", "4"]),
        ("dense", ["--dense-layers", "3"]),
    ):
        done = run("-m", "scripts.upcycle", dense / "mistral", tmp_path / name, *words, *data)
        assert ("function: that of" in done.stdout) == (name == "moe")
        losses[name] = loss_of(run("-m", "scripts.validate", tmp_path / name).stdout)
    assert losses["moe"] == pytest.approx(losses["dense"], rel=1e-5)
    steps = ["--train.steps=30", "--optimizer.lr=3e-3", "--train.micro_batch=8"]
    run("-m", "train", tmp_path / "moe" / "config.toml", *steps)
    after = loss_of(run("-m", "scripts.validate", tmp_path / "moe" / "trained").stdout)
    assert after < 0.9 * losses["moe"]
    lines = (tmp_path / "moe" / "trained" / "metrics.jsonl").read_text().splitlines()
    assert after == pytest.approx(json.loads(lines[-1])["validation_loss"], rel=1e-4)


def loss_of(line: str) -> float:
    found = re.search(r": (\d+\.\d+) nats per token", line)
    assert found, line
    return float(found[1])


def test_balance_is_not_decided_by_the_source(dense: Path, tmp_path: Path) -> None:
    changed = ["--model.moe.global_aux_loss_coef=0.01", "--model.moe.bias_update_rate=0"]
    upcycle_checkpoint(str(dense / "llama"), tmp_path / "out", Recipe(), changed)
    moe = load(tmp_path / "out" / "config.toml").model.moe
    assert (moe.global_aux_loss_coef, moe.bias_update_rate) == (0.01, 0.0)
