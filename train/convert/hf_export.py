"""Converts a checkpoint to a Hugging Face folder: config.json, generation_config.json, safetensors
shards with their index, the tokenizer and its chat template, in an architecture that transformers,
SGLang and vLLM support.

It needs no process group and no model in memory: one shard at a time is assembled from pieces of
the checkpoint's boxes.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from configs.loader import from_dict, unflatten
from configs.model import ModelConfig
from configs.paths import local_path
from models.hf.files import Index, write_tensors
from models.hf.folder import INDEX
from models.hf.fp8_blocks import fp8_plan
from models.hf.table import architecture, hf_config, hf_tensors
from models.layers.box import Box
from train.atomic_files import naming
from train.checkpoint import checkpoint
from train.tokenizer.files import GENERATION, SPECIAL_IDS, imported, longest_sequence, pass_on
from train.tokenizer.hf_files import export_tokenizer
from train.tokenizer.tokenizer import load_tokenizer


def export_hf(source: Path, out: Path | None, dtype: torch.dtype) -> Path:
    """Write the newest checkpoint of `source` (or the checkpoint `source` itself) to `out`.

    dtype: with float8_e4m3fn, tensors that readers do not support in FP8 are bf16
    (`models.hf.fp8_blocks`). out: default `<run>/export`; an earlier export there is replaced once
    the new one is complete. Raises UserError if the model has no Hugging Face form or the
    checkpoint is damaged.
    """
    folder = checkpoint.find(local_path(source)).resolve()
    manifest = checkpoint.read_manifest(folder)
    checkpoint.verify_files(manifest)
    config = from_dict(unflatten(manifest.config), str(folder / "manifest.json"))
    is_run = (local_path(source) / "config.toml").is_file()
    run = local_path(source).resolve() if is_run else folder.parent.parent
    out = local_path(out or run / "export").resolve()
    if out.exists() and not (out / INDEX).is_file():
        raise UserError(f"--out {out}: exists and is not an export; choose another folder")
    tokenizer = run / "tokenizer" / "tokenizer.json"
    came_with = imported(tokenizer.parent)
    if came_with is None and not tokenizer.is_file():
        raise UserError(f"{tokenizer}: missing; an export needs the tokenizer of its run")
    if tokenizer.is_file():
        load_tokenizer(tokenizer, config.model.vocab_size)
    is_fp8 = dtype == torch.float8_e4m3fn
    described = hf_config(
        config.model,
        max_positions=max(config.data.seq_len, longest_sequence(came_with or {})),
        eos_token_id=0,  # this and others are set below
        dtype=str(torch.bfloat16 if is_fp8 else dtype).removeprefix("torch."),
    )
    if is_fp8:
        described["quantization_config"] = fp8_plan(config.model).quantization_config()
    reader = checkpoint.Reader(manifest)
    _refuse_lost(reader, config.model)
    partial, old = (out.with_name(f".{out.name}.{word}") for word in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with naming(out):
            partial.mkdir(parents=True)
            write_tensors(partial, config.model, lambda n, index: _read(reader, n, index), dtype)
            _write_beside(partial, tokenizer.parent, described, came_with)
            shutil.rmtree(old, ignore_errors=True)
            if out.exists():
                out.rename(old)
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return out


def _write_beside(
    folder: Path, tokenizer: Path, described: dict[str, Any], came_with: dict[str, Any] | None
) -> None:
    """Write tokenizer, generation settings and config.json; `came_with`: those of an imported
    model."""
    if came_with is None:
        ids = export_tokenizer(
            tokenizer / "tokenizer.json", folder, described["max_position_embeddings"]
        )
        _write_json(folder / GENERATION, {**ids, "do_sample": False})
    else:
        pass_on(tokenizer, folder, with_imported=False)
        ids = {key: came_with[key] for key in SPECIAL_IDS if key in came_with}
    others = {key: value for key, value in described.items() if key not in SPECIAL_IDS}
    _write_json(folder / "config.json", others | ids)


def _refuse_lost(reader: checkpoint.Reader, model: ModelConfig) -> None:
    """Raise UserError if the architecture cannot store a tensor of the checkpoint that is not zero,
    such as a balancing bias that an earlier run has changed."""
    has_place = {f"model.{t.ours}" for t in hf_tensors(model)}
    for name in reader.manifest.boxes:
        if name.startswith("model.") and name not in has_place:
            if reader.read(name, reader.whole(name)).any():
                raise UserError(
                    f"{reader.manifest.folder}: {name} is not zero, and {architecture(model)} has "
                    "no place for it; with model.moe.bias_update_rate > 0 another may have"
                )


def _read(reader: checkpoint.Reader, name: str, index: Index) -> Tensor:
    """`ours[index]` from the checkpoint."""
    whole = reader.whole(f"model.{name}").whole
    *single, rows = index
    assert isinstance(rows, slice)
    depth = len(single)
    offset = (*single, rows.start, *(0 for _ in whole[depth + 1 :]))
    shape = (rows.stop - rows.start, *whole[depth + 1 :])
    value = reader.read(f"model.{name}", Box(whole, offset, (1,) * depth + shape))
    return value.reshape(shape)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
