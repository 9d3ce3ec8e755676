"""Files of a model folder that are not weights, are duplicates, or are not regular files."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import UserError
from models.hf.checkpoint import HFCheckpoint
from models.hf.dense import open_dense
from models.hf.files import read_config, read_model
from models.hf.folder import INDEX, read_json
from serve.engine.loading import open_export
from tests.models.families import FAMILIES
from tests.models.hf.test_hf import random_decoder, write

PICKLES = ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "pytorch_model.bin", "a.PKL")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    write(random_decoder(FAMILIES["qwen3"]), path, 10**9)
    return path


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A Qwen3-MoE in one file with an index, in a form that the server can load."""
    return Path(shutil.copytree(source, tmp_path / "hf"))


@pytest.fixture(scope="module")
def dense_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama of one layer, written by hand."""
    path = tmp_path_factory.mktemp("dense")
    shapes = {
        "model.embed_tokens": (20, 8), "model.norm": (8,), "model.layers.0.input_layernorm": (8,),
        "model.layers.0.post_attention_layernorm": (8,),
        **{f"model.layers.0.self_attn.{x}_proj": (8, 8) for x in "qkvo"},
        "model.layers.0.mlp.gate_proj": (12, 8), "model.layers.0.mlp.up_proj": (12, 8),
        "model.layers.0.mlp.down_proj": (8, 12),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{k}.weight": torch.randn(s, generator=generator) for k, s in shapes.items()}
    save_file(tensors, path / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 20,
        "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 12, "tie_word_embeddings": True, "max_position_embeddings": 64,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def dense(dense_source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense_source, tmp_path / "dense"))


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        read()
    assert "\n" not in str(error.value) and len(str(error.value)) < 800
    return str(error.value)


def read(folder: Path) -> object:
    return read_model(folder, torch.float32)


def change(file: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite a single weights file and drop the index."""
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file.with_name("model.safetensors"))
    if file.name != "model.safetensors":
        file.unlink()
    (file.parent / INDEX).unlink(missing_ok=True)


def only(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def test_files_beside_the_weights_are_left_where_they_lie(folder: Path, dense: Path) -> None:
    """Files as in every Trainer folder; a pickle that would raise an error when opened is not
    opened."""
    for name in PICKLES:
        for place in (folder, dense):
            (place / name).write_bytes(b"\x80\x04cos\nabort\n.")
    model, raw = read_config(folder)
    (line,) = HFCheckpoint(folder, model, raw).left_out
    assert line == "file a.PKL and 4 more: may hold pickles, never opened"
    assert open_dense(dense).left_out == (line,)
    read(folder)
    for place, opened in ((folder, read), (dense, open_dense)):
        for file in (*place.glob("*.safetensors"), *place.glob(INDEX)):
            file.unlink()
        told = refusal(lambda opened=opened, place=place: opened(place))  # type: ignore[misc]
        assert "has no *.safetensors; a.PKL may hold pickles" in told and "convert it to" in told
        for name in PICKLES:
            (place / name).unlink()
        told = refusal(lambda opened=opened, place=place: opened(place))  # type: ignore[misc]
        assert told == f"{place}: has no *.safetensors"


def no_file(kind: str, path: Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path.name)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to itself", "device"])
@pytest.mark.parametrize(
    "name", ["config.json", INDEX, "model", "generation_config.json", "tokenizer.json"]
)
def test_what_is_no_file_is_never_opened(kind: str, name: str, folder: Path, dense: Path) -> None:
    """Reading a pipe would block forever, and a device has no end."""
    path = only(folder) if name == "model" else folder / name
    no_file(kind, path)
    told = refusal(lambda: open_export(folder, device="cpu"))
    assert path.name in told or INDEX in told
    assert any(word in told for word in ("pipe", "folder", "link", "loop", "leads out", "must be"))
    if name in ("config.json", "model"):
        path = dense / ("model.safetensors" if name == "model" else name)
        no_file(kind, path)
        assert path.name in refusal(lambda: open_dense(dense))


def test_a_folder_that_is_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("x")
    for opened in (read, open_dense):
        assert "no such folder" in refusal(lambda opened=opened: opened(tmp_path / "x"))  # type: ignore[misc]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000, '{"a":' * 100_000, "1" * 5000, "\ufeff{}", "{}" + "x" * 60_000, '"' * 3,
        json.dumps({"architectures": ["y" * 60_000]}), " " * (2**24 + 1),
        json.dumps({"architectures": ["Qwen3MoeForCausalLM"], "hidden_act": {"a" * 60_000: [1]}}),
        json.dumps({"architectures": ["Qwen3MoeForCausalLM\nx"]}),
        json.dumps({"architectures": [["\ud800\n"] * 5000] * 50}),
    ],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_json_without_end(text: str, folder: Path, dense: Path) -> None:
    for place, opened in ((folder, read), (dense, open_dense)):
        (place / "config.json").write_text(text, "utf-8")
        assert "config.json" in refusal(lambda opened=opened, place=place: opened(place))  # type: ignore[misc]


def test_names_without_end(folder: Path) -> None:
    """Names of tensors and files are printed on one line, shortened."""
    file = only(folder)
    index: dict[str, Any] = json.loads((folder / INDEX).read_text())
    for name in ("x" * 60_000, "a\nb"):
        (folder / INDEX).write_text(json.dumps({"weight_map": {name: file.name}}))
        refusal(lambda: read(folder))
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": f"{name}.safetensors"}}))
        refusal(lambda: read(folder))
    (folder / INDEX).write_text(json.dumps(index))
    save_file({"x": torch.zeros(1)}, folder / "a\nb.safetensors")
    refusal(lambda: read(folder))
    (folder / "a\nb.safetensors").unlink()
    change(file, lambda t: t.update({"y\n" * 5000: torch.zeros(1)}))
    assert "1 tensors unexpected" in refusal(lambda: read(folder))


def test_the_index_lists_every_tensor_where_it_lies(folder: Path) -> None:
    index: dict[str, Any] = json.loads((folder / INDEX).read_text())
    weight_map = index["weight_map"]
    name = "model.norm.weight"

    def told(**changed: Any) -> str:
        kept = {k: v for k, v in (weight_map | changed).items() if v is not None}
        (folder / INDEX).write_text(json.dumps({"weight_map": kept}))
        return refusal(lambda: read(folder))

    omitted = told(**{name: None})
    assert f"omits 1 tensors, the first is {name} of {only(folder).name}" in omitted
    assert "weight_map: ghost is not in" in told(ghost=only(folder).name)
    assert "this shard is missing" in told(ghost="ghost.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    save_file({name: torch.zeros(32)}, folder / "z.safetensors")
    assert f"{name} is also in" in refusal(lambda: read(folder))
    save_file({"more": torch.zeros(32)}, folder / "z.safetensors")
    assert "omits 1 tensors, the first is more of z.safetensors" in refusal(lambda: read(folder))


def other(value: Tensor, how: str) -> Tensor:
    """A matrix different from `value`."""
    changed = value.clone().float()
    if how == "shape":
        return torch.zeros(3, 3)
    if how == "no dimension":
        return torch.zeros(())
    if how == "integers":
        return torch.zeros(value.shape, dtype=torch.int32)
    changed[-1, -1] = float("nan") if how == "nan" else changed[-1, -1] + 1
    return changed


HOW = ("shape", "no dimension", "integers", "nan", "one number")


@pytest.mark.parametrize("how", HOW)
def test_a_head_beside_a_tied_embedding_is_that_embedding(how: str, dense: Path) -> None:
    """Upcycling would use the embedding as head; transformers, given both, uses the head."""
    file = dense / "model.safetensors"
    embedding = load_file(file)["model.embed_tokens.weight"]
    change(file, lambda t: t.update({"lm_head.weight": embedding.clone()}))
    assert open_dense(dense).model.tie_embeddings
    change(file, lambda t: t.update({"lm_head.weight": other(embedding, how)}))
    told = refusal(lambda: open_dense(dense))
    assert "tie_word_embeddings" in told and "lm_head.weight is another matrix" in told


@pytest.mark.parametrize("copy", ["embed_tokens", "shared_head.head"])
def test_copies_within_modules_for_more_tokens_are_copies(copy: str, tmp_path: Path) -> None:
    """DeepSeek-V3's module has copies of embedding and head; they are compared before they are left
    out."""
    model = FAMILIES["deepseek-v3-mtp"]
    write(random_decoder(model), tmp_path, 10**9)
    name = f"model.layers.{model.n_layers + 1}.{copy}.weight"
    file = only(tmp_path)
    good = load_file(file)[name]
    change(file, lambda t: t)
    file = tmp_path / "model.safetensors"
    read_model(tmp_path, torch.float32, mtp=True)
    for how in HOW:
        change(file, lambda t, how=how: t.update({name: other(good, how)}))  # type: ignore[misc]
        told = refusal(lambda: read_model(tmp_path, torch.float32, mtp=True))
        assert f"{name} is another matrix than" in told, how
        read_model(tmp_path, torch.float32)  # the modules are left out as a whole
    change(file, lambda t: t.update({name: good.bfloat16()}))
    assert "another matrix" in refusal(lambda: read_model(tmp_path, torch.float32, mtp=True))
    change(file, lambda t: t.pop(name))
    read_model(tmp_path, torch.float32, mtp=True)


def test_quantised_copies_are_compared_as_numbers(tmp_path: Path) -> None:
    """A copy in FP8 blocks equals the main tensor if its dequantized values do."""
    model = FAMILIES["deepseek-v3-mtp"]
    write(random_decoder(model), tmp_path, 10**9)
    change(only(tmp_path), lambda t: t)
    file = tmp_path / "model.safetensors"
    raw: dict[str, Any] = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    name = f"model.layers.{model.n_layers}.embed_tokens.weight"
    exact = torch.randint(-8, 8, (model.vocab_size, model.d_model)).float()
    packed = {
        name: (exact / 0.5).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.full((1, 1), 0.5),
    }  # fmt: skip
    rest = [f"model.layers.{model.n_layers + 1}.embed_tokens.weight", "model.embed_tokens.weight"]
    change(file, lambda t: t.update(packed | {k: exact.clone() for k in rest}))
    read_model(tmp_path, torch.float32, mtp=True)
    change(file, lambda t: t.update({f"{name}_scale_inv": torch.ones(1, 1)}))
    assert "another matrix" in refusal(lambda: read_model(tmp_path, torch.float32, mtp=True))


def test_two_forms_of_one_tensor(tmp_path: Path) -> None:
    """GPT-OSS with its experts both packed and unpacked; no key specifies which to use."""
    model = FAMILIES["gpt-oss"]
    write(random_decoder(model), tmp_path, 10**9)
    raw: dict[str, Any] = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    name = "model.layers.0.mlp.experts.down_proj"
    n, width = model.moe.n_experts, model.d_model
    packed = {
        f"{name}_blocks": torch.zeros(n, width, 1, 16, dtype=torch.uint8),
        f"{name}_scales": torch.zeros(n, width, 1, dtype=torch.uint8),
    }
    change(only(tmp_path), lambda t: t.update(packed))
    told = refusal(lambda: read(tmp_path))
    assert f"{name} and {name}_blocks are both there" in told


def test_a_language_model_under_two_names(tmp_path: Path) -> None:
    write(random_decoder(FAMILIES["llama4"]), tmp_path, 10**9)
    text: dict[str, Any] = json.loads((tmp_path / "config.json").read_text())
    raw = {"architectures": ["Llama4ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    name = "model.norm.weight"
    change(only(tmp_path), lambda t: t.update({f"language_model.{name}": t[name] + 1}))
    assert f"{name} and {name} are both there" in refusal(lambda: read(tmp_path)).replace(
        "language_model.", ""
    )


def test_a_snapshot_of_the_hub_cache_is_a_folder_of_links(tmp_path: Path) -> None:
    """`models--x/snapshots/REVISION` links each file to `models--x/blobs`, and contains nothing
    else."""
    snapshot, blobs = tmp_path / "snapshots" / "0f3e", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "a1").write_text('{"x": 1}')
    (tmp_path / "refs").write_text('{"x": 2}')
    (snapshot / "config.json").symlink_to("../../blobs/a1")
    (snapshot / "other.json").symlink_to("../../refs")
    assert read_json(snapshot / "config.json") == {"x": 1}
    with pytest.raises(UserError, match="leads out of the folder"):
        read_json(snapshot / "other.json")
