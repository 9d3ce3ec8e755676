"""import(export_hf(x)) = x for random models, and transformers loads every one of them."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import UserError
from configs.loader import flatten, from_dict, unflatten
from configs.model import ModelConfig
from configs.schema import DataConfig, JobConfig, OptimizerConfig, RunConfig, TrainConfig
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.hf.config.undetermined_settings import KEY
from models.hf.files import read_model
from models.hf.table import architecture, from_hf_config, hf_config, hf_tensors
from models.router import routers
from parallel.shards import box_of
from tests.models.families import FAMILIES
from tests.models.hf.test_hf import random_decoder, read_all
from tests.models.random_models import ARCHITECTURES, random_model
from train.checkpoint import checkpoint
from train.convert.hf_export import export_hf
from train.convert.hf_import import import_hf
from train.tokenizer.tokenizer import train_tokenizer

VOCAB = 263


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = ["def value in range return token expert index " * 3]
    train_tokenizer(lambda: texts, 261, lambda line: None).save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def run_of(decoder: Decoder, folder: Path, tokenizer: Path) -> Path:
    """A run folder with one checkpoint of `decoder`."""
    config = JobConfig(
        run=RunConfig(dir="x"), model=decoder.config, data=DataConfig(seq_len=64),
        optimizer=OptimizerConfig(lr=1.0), train=TrainConfig(steps=1, global_batch=1,
        micro_batch=1),
    )  # fmt: skip
    boxes = {f"model.{k}": (box_of(v), v.float()) for k, v in decoder.state_dict().items()}
    state = {"step": 3, "owes_validation": False, "corpus": "", "compute": ""}
    checkpoint.write(folder / "checkpoints", [lambda: boxes], state, flatten(config))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return folder


def contents(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model of a checkpoint, and its assembled tensors."""
    manifest = checkpoint.read_manifest(path)
    reader = checkpoint.Reader(manifest)
    tensors = {name: reader.read(name, reader.whole(name)) for name in manifest.boxes}
    return from_dict(unflatten(manifest.config), "manifest").model, tensors


def drawn(family: str, n: int) -> Iterator[ModelConfig]:
    rng = Random(f"{family} round trip")
    for _ in range(n):
        yield random_model(family, rng, VOCAB)


def described(model: ModelConfig) -> dict[str, Any]:
    given = hf_config(model, max_positions=64, eos_token_id=0, dtype="float32")
    return dict(json.loads(json.dumps(given)))


@pytest.mark.parametrize("n", [75, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_config_json_gives_the_model_again(family: str, n: int) -> None:
    for model in drawn(family, n):
        assert architecture(model) == ARCHITECTURES[family], model
        written = described(model)
        again = from_hf_config(written, "config.json")
        assert again == model
        assert described(again) == written
        # a reader that ignores our key reads a model with the same tensors
        published = from_hf_config({k: v for k, v in written.items() if k != KEY}, "config.json")
        if published != model:
            names = [(t.name, t.shape) for t in hf_tensors(model)]
            assert names == [(t.name, t.shape) for t in hf_tensors(published)]


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_tensors_and_files_are_the_same_again(
    family: str, n: int, tmp_path: Path, tokenizer: Path
) -> None:
    """Export, import, export: model and tensors bit for bit, every file byte for byte. transformers
    finds exactly the tensors it expects and computes the same logits (1e-5 of the norm; fp32,
    another order of summation)."""
    transformers = pytest.importorskip("transformers")
    for number, given in enumerate(drawn(family, n)):
        place = tmp_path / str(number)
        decoder = random_decoder(given)
        model = decoder.config  # with larger initial weights
        out = export_hf(run_of(decoder, place / "run", tokenizer), None, torch.float32)
        saved, _ = import_hf(out, place / "ours", shard_bytes=9_000)
        again, tensors = contents(saved)
        assert again == model
        ours = {f"model.{k}": v.float() for k, v in decoder.state_dict().items()}
        assert tensors.keys() == ours.keys()
        assert all(torch.equal(tensors[k], v) for k, v in ours.items())
        second = export_hf(place / "ours", None, torch.float32)
        for path in (p for p in out.rglob("*") if p.is_file()):
            assert (second / path.relative_to(out)).read_bytes() == path.read_bytes(), path
        assert len(list(second.rglob("*"))) == len(list(out.rglob("*")))
        theirs, found = transformers.AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32, output_loading_info=True, attn_implementation="eager",
            experts_implementation="eager",
        )  # fmt: skip
        beyond = tuple(f"model.layers.{model.n_layers + i}." for i in range(model.mtp_depth))
        unexpected = {k for k in found.pop("unexpected_keys") if not k.startswith(beyond or ("-",))}
        assert not unexpected and not any(found.values()), (model, unexpected, found)
        tokens = torch.randint(0, VOCAB, (1, 33), generator=torch.Generator().manual_seed(number))
        positions = torch.arange(33)[None]
        with torch.no_grad():
            ours_TV = decoder(tokens[0], positions[0], DocumentAttention(positions))
            error = (ours_TV - theirs.eval()(tokens).logits[0]).norm() / ours_TV.norm()
        assert error < 1e-5, (model, error)


def with_moe(model: ModelConfig, **changes: Any) -> ModelConfig:
    return replace(model, moe=replace(model.moe, **changes))


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("glm4", {"moe": {"route_scale": 1e8}}, "routed_scaling_factor"),
        ("llama4", {"attention": {"temperature_floor": 2**30}}, "floor_scale"),
        ("qwen3", {"n_layers": 9_000, "moe": {"n_experts": 999}}, "more than 1048576 experts"),
        ("glm4-mtp", {"n_dense_layers": 3}, "model.mtp_depth"),
    ],
    ids=str,
)
def test_what_could_not_be_read_again_is_refused(
    name: str, change: dict[str, Any], expected: str
) -> None:
    """Refused by the rule that `--check` prints before training."""
    model = FAMILIES[name]
    parts = {
        key: replace(getattr(model, key), **value) if isinstance(value, dict) else value
        for key, value in change.items()
    }
    with pytest.raises(UserError, match=expected) as refused:
        architecture(replace(model, **parts))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "must be an object"),
        ({"moe.n_expert": 3}, "no such setting"),
        ({"moe": {}}, "no such setting"),
        ({"": 1}, "no such setting"),
        ({"moe.": 1}, "no such setting"),
        ({"__class__.x": 1}, "no such setting"),
        ({"moe.rule.x": 1}, "no such setting"),
        ({"moe.bias_update_rate": "fast"}, "value that the setting cannot have"),
        ({"moe.bias_update_rate": 10**400}, "value that the setting cannot have"),
        ({"moe.bias_update_rate": float("nan")}, "value that the setting cannot have"),
        ({"moe.bias_update_rate": 7.0}, "bias_update_rate = 7.0"),
        ({"moe.force_balance": True}, "contradicts"),
        ({"attention.qk_norm": ["rms"]}, "value that the setting cannot have"),
        ({"attention.qk_norm": "none"}, "contradicts"),
        ({"moe.n_shared_experts": 0}, "contradicts"),
        ({"d_ff": 41}, "contradicts"),
        ({"n_layers": 4}, "contradicts"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_our_key_says_only_what_the_others_leave_open(given: Any, expected: str) -> None:
    written = described(FAMILIES["glm4"])
    with pytest.raises(UserError, match=expected) as refused:
        from_hf_config(written | {KEY: given}, "config.json")
    assert str(refused.value).startswith(f"config.json: {KEY}: ")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_a_shared_expert_that_is_there_after_all(tmp_path: Path, tokenizer: Path) -> None:
    """The shared expert is exported as zeros; after training it, users must remove our key."""
    model = replace(FAMILIES["glm4-bare"], vocab_size=VOCAB)
    decoder = random_decoder(model)
    model = decoder.config
    out = export_hf(run_of(decoder, tmp_path / "run", tokenizer), None, torch.float32)
    assert read_model(out, torch.float32).config == model, "served without it, too"
    (file,) = out.glob("*.safetensors")
    tensors = read_all(out)
    tensors["model.layers.1.mlp.shared_experts.up_proj.weight"][3, 4] = 1e-30
    save_file(tensors, file)
    for read in (lambda: read_model(out, torch.float32), lambda: import_hf(out, tmp_path / "ours")):
        with pytest.raises(UserError, match=r"shared_experts\.up_proj\.weight is not zero"):
            read()
    config = json.loads((out / "config.json").read_text())
    del config[KEY]["moe.n_shared_experts"]
    (out / "config.json").write_text(json.dumps(config))
    assert read_model(out, torch.float32).config == with_moe(model, n_shared_experts=1)


def test_a_tensor_without_a_place_is_not_lost(tmp_path: Path, tokenizer: Path) -> None:
    """A balancing bias changed by an earlier run still affects the choice of experts."""
    decoder = random_decoder(replace(FAMILIES["qwen3"], vocab_size=VOCAB))
    next(iter(routers(decoder))).bias_E[2] = 0.1
    run = run_of(decoder, tmp_path / "run", tokenizer)
    with pytest.raises(UserError, match=r"router\.bias_E is not zero, and Qwen3MoeForCausalLM has"):
        export_hf(run, None, torch.float32)
    assert not (run / "export").exists() and not list(run.glob(".export*"))


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "float32"), (3.4e38, "bfloat16")])
def test_no_export_holds_what_an_import_refuses(
    value: float, dtype: str, tmp_path: Path, tokenizer: Path
) -> None:
    decoder = random_decoder(replace(FAMILIES["mixtral"], vocab_size=VOCAB))
    with torch.no_grad():
        decoder.norm.weight[3] = value
    run = run_of(decoder, tmp_path / "run", tokenizer)
    with pytest.raises(UserError, match=rf"model\.norm\.weight holds inf or NaN as {dtype}"):
        export_hf(run, None, getattr(torch, dtype))
    assert not list(run.glob("*export*"))
