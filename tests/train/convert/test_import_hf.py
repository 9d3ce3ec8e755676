"""Import of Hugging Face checkpoints: exact in both directions, complete, with little memory."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import UserError
from configs.loader import flatten, from_dict, load, unflatten
from configs.model import ModelConfig
from configs.schema import DataConfig, JobConfig, OptimizerConfig, RunConfig, TrainConfig
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.hf.files import write_tensors
from models.hf.table import hf_config, hf_tensors
from parallel.shards import box_of
from scripts.export import main as export_main
from scripts.import_hf import main
from tests.models.families import FAMILIES
from tests.models.hf.test_hf import random_decoder, read_all, write
from tests.runs import largest_file, run
from tests.train.convert.live_bytes import LiveBytes
from tests.train.in_process import run_train
from train.checkpoint import checkpoint
from train.convert.hf_export import export_hf
from train.convert.hf_import import import_hf
from train.tokenizer.tokenizer import train_tokenizer

MAKE = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
for folder in sys.argv[1:]:
    given = json.load(open(folder + "/wanted.json"))
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.normal_(std=0.2).add_("norm" in name)
    tokens = torch.randint(0, given["vocab_size"], (2, 37))
    logits = model.eval()(tokens).logits.detach()
    save_file({"tokens": tokens, "logits": logits}, folder + "/theirs.check")
    for layout in ("published", "fused"):
        model.save_pretrained(
            folder + "/" + layout, max_shard_size="40kB",
            save_original_format=layout == "published",
        )
"""

BF16 = {"deepseek-v3-mtp", "gpt-oss", "llama4"}
"""Families whose bf16 folder is imported by default: experts one by one and fused, an fp32 bias."""
WITH_MTP = {"glm4", "deepseek-v3"}
"""Families whose layers are all in the same family with MTP."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = ["def value in range return token expert index " * 3]
    trained = train_tokenizer(lambda: texts, 261, lambda line: None)
    trained.save(str(folder / "tokenizer.json"))
    return folder


def with_vocabulary(name: str) -> ModelConfig:
    """A family's small model with a vocabulary that fits a byte-level tokenizer, as an export needs
    one."""
    return replace(FAMILIES[name], vocab_size=263)


def hf_folder(model: ModelConfig, folder: Path, tokenizer: Path) -> Path:
    folder.mkdir(exist_ok=True)
    write(random_decoder(model), folder)
    shutil.copy(tokenizer / "tokenizer.json", folder)
    return folder


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, assembled."""
    reader = checkpoint.Reader(checkpoint.read_manifest(path))
    return {name: reader.read(name, reader.whole(name)) for name in reader.manifest.boxes}


def model_of(path: Path) -> Decoder:
    manifest = checkpoint.read_manifest(path)
    checkpoint.verify_files(manifest)
    model = Decoder(from_dict(unflatten(manifest.config), "manifest").model)
    checkpoint.load(manifest, {f"model.{k}": v for k, v in model.state_dict().items()})
    return model.eval()


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in WITH_MTP else []) for n in FAMILIES],
)
def test_import_of_an_export_is_the_checkpoint(name: str, tmp_path: Path, tokenizer: Path) -> None:
    """x -> export -> import: the same tensors bit for bit, divided differently."""
    model = with_vocabulary(name)
    decoder = random_decoder(model)
    x = {f"model.{k}": v.float() for k, v in decoder.state_dict().items()}
    config = JobConfig(
        run=RunConfig(dir="x"), model=model, data=DataConfig(seq_len=64),
        optimizer=OptimizerConfig(lr=1.0), train=TrainConfig(steps=1, global_batch=1,
        micro_batch=1),
    )  # fmt: skip
    state = {"step": 3, "owes_validation": False, "corpus": "", "compute": ""}
    boxes = {k: (box_of(v), v) for k, v in x.items()}
    checkpoint.write(tmp_path / "run/checkpoints", [lambda: boxes], state, flatten(config))
    shutil.copytree(tokenizer, tmp_path / "run/tokenizer")
    out = export_hf(tmp_path / "run", None, torch.float32)
    saved, _ = import_hf(out, tmp_path / "again", shard_bytes=30_000)
    assert len(list(saved.glob("*.safetensors"))) > 3
    same(tensors_of(saved), x)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if name in names else [pytest.mark.slow])
        for dtype, names in (
            # of a family in BF16 the test before has the fp32 folder
            (torch.float32, FAMILIES.keys() - BF16 - WITH_MTP),
            (torch.bfloat16, BF16),
        )
        for name in FAMILIES
    ],
    ids=str,
)
def test_export_of_an_import_is_the_folder(
    name: str, dtype: torch.dtype, tmp_path: Path, tokenizer: Path
) -> None:
    folder = hf_folder(with_vocabulary(name), tmp_path / "hf", tokenizer)
    if dtype == torch.bfloat16:
        for path in folder.glob("*.safetensors"):
            kept = {k: v if k.endswith("correction_bias") else v.bfloat16()
                    for k, v in load_file(path).items()}  # fmt: skip
            save_file(kept, path)
    import_hf(folder, tmp_path / "ours", shard_bytes=30_000)
    same(read_all(export_hf(tmp_path / "ours", None, dtype)), read_all(folder))


THEIRS = [name for name in FAMILIES if name != "glm4-bare"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models of transformers, in both layouts, with their logits: a folder per family."""
    folder = tmp_path_factory.mktemp("theirs")
    for name in THEIRS:
        (folder / name).mkdir()
        config = hf_config(FAMILIES[name], max_positions=64, eos_token_id=0, dtype="float32")
        (folder / name / "wanted.json").write_text(json.dumps(config))
    run("-P", "-c", MAKE, *(folder / name for name in THEIRS))
    return folder


# an MTP model has all layers of the same family without
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] if name in ("glm4", "deepseek-v3", "qwen3") else []
        )
        for name in THEIRS
    ],
)
def test_a_model_of_transformers_in_both_layouts(name: str, theirs: Path, tmp_path: Path) -> None:
    """transformers generates and writes the weights, in the published layout and in that of its
    modules. Logits within 1e-5 of the norm (fp32, other order of summation)."""
    folder = theirs / name
    given = load_file(folder / "theirs.check")
    positions = torch.arange(37).expand(2, 37)
    imported = []
    for layout in ("published", "fused"):
        saved, lines = import_hf(folder / layout, tmp_path / f"ours-{layout}")
        with torch.no_grad():
            logits = model_of(saved)(
                given["tokens"].reshape(-1), positions.reshape(-1), DocumentAttention(positions)
            )
        expected = given["logits"].flatten(0, 1)
        assert (logits - expected).norm() < 1e-5 * expected.norm(), layout
        written = read_all(folder / layout)
        elements = sum(value.numel() for value in written.values())
        assert lines[0] == f"read {len(written):,} tensors, {elements:,} elements"
        imported.append(tensors_of(saved))
    same(*imported)
    for path in ("published", "fused"):
        names = list(read_all(folder / path))
        fused = any(k.endswith("experts.gate_up_proj") for k in names)
        assert fused == (path == "fused" or name in ("gpt-oss", "llama4"))


@pytest.mark.parametrize("name", ["gpt-oss", "llama4"])
def test_fused_families_one_expert_at_a_time(name: str, tmp_path: Path) -> None:
    """The other layout of the two fused families, against plain indexing."""
    folder = tmp_path / "hf"
    folder.mkdir()
    write(random_decoder(FAMILIES[name]), folder)
    fused = read_all(folder)
    single: dict[str, Tensor] = {}
    for key, value in fused.items():
        base, _, last = key.rpartition(".experts.")
        if not base:
            single[key] = value
            continue
        end = "bias" if last.endswith("_bias") else "weight"
        for e in range(len(value)):
            mine, at = value[e].T if end == "weight" else value[e], f"{base}.experts.{e}"
            if last.startswith("gate_up"):
                gate, up = (mine[0::2], mine[1::2]) if name == "gpt-oss" else mine.chunk(2)
                single |= {f"{at}.gate_proj.{end}": gate, f"{at}.up_proj.{end}": up}
            else:
                single[f"{at}.down_proj.{end}"] = mine
    other = tmp_path / "single"
    other.mkdir()
    save_file({k: v.contiguous() for k, v in single.items()}, other / "model.safetensors")
    shutil.copy(folder / "config.json", other)
    paths = [import_hf(path, tmp_path / f"{path.name}-ours")[0] for path in (folder, other)]
    same(tensors_of(paths[1]), tensors_of(paths[0]))


@pytest.mark.parametrize(("name", "n_layers"), [("qwen3", 7), ("gpt-oss", 6), ("llama4", 12)])
def test_memory_stays_below_two_shards(name: str, n_layers: int, tmp_path: Path) -> None:
    """A model of many shards; peak memory, without mapped files (those are closed every 32 MiB), is
    less than twice the largest file."""
    small = FAMILIES[name]
    model = replace(small, n_layers=n_layers, moe=replace(small.moe, n_experts=16, d_expert=48))
    decoder, shard = random_decoder(model), 60_000
    state = decoder.state_dict()

    def read(ours: str, index: Any) -> Tensor:
        return state[ours][index].clone()

    out, folder = tmp_path / "bf16", tmp_path / "hf"
    out.mkdir()
    folder.mkdir()
    with LiveBytes() as live:
        files = write_tensors(out, model, read, torch.bfloat16, shard)
    largest = max(path.stat().st_size for path in files)
    assert len(files) > 15 and 0.5 * largest < live.peak < 2 * largest
    write(decoder, folder, shard)
    with LiveBytes() as live:
        saved, _ = import_hf(folder, tmp_path / "ours", shard)
    files = list(saved.glob("*.safetensors"))
    largest = max(path.stat().st_size for path in files)
    assert len(files) > 15 and 0.5 * largest < live.peak < 2 * largest


def test_no_tensor_and_no_element_is_lost(tmp_path: Path) -> None:
    """Every element is a different number, so a lost, doubled or swapped expert is detected."""
    model = FAMILIES["deepseek-v3"]
    tensors, n = {}, 0
    for t in hf_tensors(model):
        count = math.prod(t.shape)
        tensors[t.name] = torch.arange(n + 1, n + 1 + count, dtype=torch.float32).view(t.shape)
        n += count
    assert n < 2**24, "all integers are fp32 numbers"
    write(random_decoder(model), tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        save_file({k: tensors[k] for k in load_file(path)}, path)
    saved, lines = import_hf(tmp_path, tmp_path / "ours", shard_bytes=20_000)
    assert lines[0] == f"read {len(tensors):,} tensors, {n:,} elements"
    found = torch.cat([v.flatten() for v in tensors_of(saved).values()])
    assert torch.equal(found[found != 0].sort().values, torch.arange(1, n + 1).float())


def test_training_starts_from_an_import(
    tmp_path: Path, corpus: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config passes --check and trains two steps; both checkpoints export."""
    monkeypatch.setattr("train.check._bytes_per_rank", lambda *_: [])  # takes two seconds
    folder = hf_folder(with_vocabulary("qwen3"), tmp_path / "hf", tokenizer)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 7], "top_p": 0.9}')
    out = tmp_path / "ours"
    saved, _ = import_hf(folder, out)
    assert checkpoint.find(out) == saved
    config = load(out / "config.toml")
    assert config.model.moe.n_experts == 8 and config.data.seq_len == 64
    assert config.data.tokenizer == str(out / "tokenizer")
    data = [f"--data.source={corpus}", f"--data.cache_dir={tmp_path / 'cache'}"]
    assert "Qwen3MoeForCausalLM" in run_train(out / "config.toml", *data, "--check").stdout
    short = ["--train.steps=2", "--train.global_batch=2", "--optimizer.lr=0", "--data.seq_len=32"]
    short += ["--schedule.warmup_steps=2"]
    done = run_train(out / "config.toml", *data, *short)
    assert f"weights from {out}" in done.stdout
    assert "have seen other data, in the same tokens\n" in done.stdout
    trained = tensors_of(checkpoint.find(tmp_path / "ours-run"))
    weights = {k: v for k, v in trained.items() if k.startswith("model.")}
    same(weights, tensors_of(checkpoint.find(out)))  # the learning rate was 0
    same(read_all(export_hf(out, None, torch.float32)), read_all(folder))
    exported = export_hf(tmp_path / "ours-run", None, torch.float32)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (exported / name).read_bytes() == (folder / name).read_bytes()
    longest = json.loads((exported / "config.json").read_text())["max_position_embeddings"]
    assert longest == 64, "the run's sequences are shorter, the model is not"


def test_the_command_refuses_in_one_line(
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = hf_folder(with_vocabulary("glm4"), tmp_path / "hf", tokenizer)

    def refuse(expected: str, *more: str) -> None:
        words = ["import_hf", str(folder), str(tmp_path / "ours"), *more]
        monkeypatch.setattr("sys.argv", words)
        assert main() == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and expected in errors, errors
        assert not (tmp_path / "ours").exists() and not list(tmp_path.glob(".ours*"))

    raw = json.loads((folder / "config.json").read_text())
    poisoned = raw | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(poisoned))
    refuse("config.json: auto_map = ")
    (folder / "tokenizer.json").write_text("{}")
    refuse("tokenizer.json", "--ignore-auto-map")
    (folder / "tokenizer.json").unlink()
    done = run("-m", "scripts.import_hf", folder, tmp_path / "ours", "--ignore-auto-map")
    assert "no tokenizer.json" in done.stdout and "set data.tokenizer" in done.stdout
    with pytest.raises(UserError, match="exists; an import makes a new folder"):
        import_hf(folder, tmp_path / "ours", ignore_auto_map=True)


def test_a_disk_that_takes_no_more_is_named(
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Import and export, with the disk full at each of the files."""
    folder, ours, back = (tmp_path / name for name in ("hf", "ours", "back"))
    hf_folder(with_vocabulary("mixtral"), folder, tokenizer)
    saved, _ = import_hf(folder, tmp_path / "whole")
    for command, words, written in (
        (main, [folder, ours], [*saved.iterdir(), *(tmp_path / "whole" / "tokenizer").iterdir()]),
        (export_main, [tmp_path / "whole", "--out", back], folder.iterdir()),
    ):
        for size in sorted({0, 1, *(path.stat().st_size - 1 for path in written)}):
            monkeypatch.setattr("sys.argv", ["command", *map(str, words)])
            with largest_file(size):
                code = command()
            errors = capsys.readouterr().err
            assert code == 2 and errors.count("\n") == 1, errors
            assert "File too large" in errors and "Errno" not in errors, errors
            assert any(place in errors for place in (".ours.", "/ours", ".back.", "/back")), errors
            assert not list(tmp_path.glob("*ours*")) + list(tmp_path.glob("*back*"))


def test_written_weights_are_for_whom_the_umask_lets_read(tmp_path: Path, tokenizer: Path) -> None:
    folder = hf_folder(with_vocabulary("mixtral"), tmp_path / "hf", tokenizer)
    for mask in (0o027, 0o077):
        before = os.umask(mask)
        try:
            saved, _ = import_hf(folder, tmp_path / f"{mask}")
            exported = export_hf(tmp_path / f"{mask}", None, torch.float32)
        finally:
            os.umask(before)
        for path in (*saved.glob("*.safetensors"), *exported.glob("*.safetensors")):
            assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path


def test_the_worst_moment_fails_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(random_decoder(FAMILIES["mixtral"]), tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"the checkpoint needs .* MiB"):
        import_hf(tmp_path, tmp_path / "ours")
    monkeypatch.undo()
    shard = max(tmp_path.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    damaged = load_file(shard)
    next(iter(damaged.values())).view(-1)[3] = float("nan")
    save_file(damaged, shard)
    with pytest.raises(UserError, match="holds inf or NaN"):
        import_hf(tmp_path, tmp_path / "ours")
    assert not list(tmp_path.glob("*ours*")) and not list(tmp_path.glob(".ours*"))
