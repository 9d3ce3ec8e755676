"""Converts a Hugging Face folder to one of our checkpoints: a folder with the layout of a run, with
`checkpoints/step-00000000`, `tokenizer/` and a `config.toml` that continues training from it
(`checkpoint.init_from`) in a new run.

Weights become fp32, the dtype of our master weights: exact for fp32, bf16 and fp16; FP8 blocks and
MXFP4 are dequantized. The checkpoint is written in files of at most 5 GiB, one after the other, so
the memory in use is that of one file for a model of any size.
"""

import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from configs.loader import flatten, to_toml
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
)
from models.decoder import Decoder
from models.hf.checkpoint import PIECE_BYTES, HFCheckpoint
from models.hf.files import SHARD_BYTES, read_config
from models.hf.folder import refuse_code
from models.hf.table import text_config
from models.layers.box import Box
from train.checkpoint import checkpoint
from train.tokenizer.files import files_for_others, longest_sequence, take_over
from train.tokenizer.tokenizer import load_tokenizer

_LONGEST_SEQUENCE = 4096
"""Maximum sequence length in config.toml, since memory grows with it; the model may allow more."""
_HEADER = """\
# Trains on from the weights imported from {source}.
# [model] describes them: leave it. Yours to decide: data.source, the lengths, [train], [optimizer].
"""


def import_hf(
    source_folder: Path, out: Path, shard_bytes: int = SHARD_BYTES, ignore_auto_map: bool = False
) -> tuple[Path, list[str]]:
    """Write `out`; returns the checkpoint and messages for the user.

    shard_bytes: maximum size of a file of the checkpoint, and so of memory. Raises UserError, one
    line, if anything in the folder contradicts its config.
    """
    source_folder = local_path(source_folder)
    model, raw = read_config(source_folder)
    if not ignore_auto_map:
        refuse_code(raw, str(source_folder / "config.json"))
    out = local_path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists; an import makes a new folder")
    source = HFCheckpoint(source_folder, model, raw)
    model = source.model
    with torch.device("meta"):
        state = Decoder(model).state_dict()
    _check_space(out.parent, sum(4 * value.numel() for value in state.values()))
    unfinished = out.with_name(f".{out.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        text = text_config(raw, str(source_folder / "config.json"))
        take_over(source_folder, unfinished / "tokenizer", raw | text)
        has_tokenizer = _check_tokenizer(source_folder, model)
        config = _experiment(out, model, text, has_tokenizer)
        header = _HEADER.format(source=source_folder.name)
        (unfinished / "config.toml").write_text(header + to_toml(config), "utf-8")
        saved = checkpoint.write(
            unfinished / "checkpoints",
            [partial(_read_file, source, boxes, shard_bytes)
             for boxes in _files({k: tuple(v.shape) for k, v in state.items()}, shard_bytes)],
            {"step": 0, "owes_validation": False, "corpus": "imported", "compute": "imported"},
            flatten(config),
        )  # fmt: skip
        source.check_complete()
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return out / saved.relative_to(unfinished), _summary(source, state, has_tokenizer, out)


def _files(shapes: dict[str, tuple[int, ...]], most_bytes: int) -> list[dict[str, Box]]:
    """The rows of tensors in each file: tensors in order, cut if they do not fit.

    A file has at most one box of a tensor, and at least one row.
    """
    files: list[dict[str, Box]] = [{}]
    free = most_bytes
    for name, whole in shapes.items():
        row, start = 4 * math.prod(whole[1:]), 0
        while start < whole[0]:
            fits = whole[0] * row <= most_bytes  # then it is not cut
            if files[-1] and (free < (whole[0] * row if fits else row)):
                files.append({})
                free = most_bytes
            n = min(whole[0] - start, max(free // row, 1))
            rest = len(whole) - 1
            files[-1][name] = Box(whole, (start, *(0,) * rest), (n, *whole[1:]))
            free -= n * row
            start += n
    return files


def _read_file(
    source: HFCheckpoint, boxes: dict[str, Box], shard_bytes: int
) -> dict[str, tuple[Box, Tensor]]:
    """The tensors of one file of the checkpoint, fp32."""
    held = {}
    for name, box in boxes.items():
        value = torch.zeros(box.shape)
        if name in source:
            piece_bytes = min(PIECE_BYTES, shard_bytes // 8)
            source.fill(name, value, box, piece_bytes)
        else:  # a router's balancing bias, which only some families have
            assert name.endswith("router.bias_E"), name
        held[f"model.{name}"] = (box, value)
    return held


def _check_space(folder: Path, n_bytes: int) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise UserError(
            f"{folder}: has {free / 2**20:,.1f} MiB free, the checkpoint needs "
            f"{n_bytes / 2**20:,.1f} MiB (fp32)"
        )


def _check_tokenizer(folder: Path, model: ModelConfig) -> bool:
    """Whether there is a `tokenizer.json`. Raises UserError if it does not match the model."""
    if not (folder / "tokenizer.json").is_file():
        return False
    try:
        load_tokenizer(folder / "tokenizer.json", model.vocab_size)
    except UserError as error:  # it names our settings; here they come from config.json
        raise UserError(
            f"{folder}: tokenizer.json and config.json (vocab_size = {model.vocab_size}) make no "
            f"experiment: {error}"
        ) from None
    return True


def _experiment(
    out: Path, model: ModelConfig, raw: dict[str, Any], has_tokenizer: bool
) -> JobConfig:
    """An experiment that continues training with a learning rate far below that of pre-training."""
    longest = longest_sequence(raw) or _LONGEST_SEQUENCE
    return JobConfig(
        run=RunConfig(dir=str(out.with_name(f"{out.name}-run"))),
        model=model,
        data=DataConfig(
            tokenizer=str(out / "tokenizer") if has_tokenizer else "",
            seq_len=min(longest, _LONGEST_SEQUENCE),
        ),
        train=TrainConfig(steps=1000, global_batch=64, micro_batch=1),
        optimizer=OptimizerConfig(lr=1e-5),
        schedule=ScheduleConfig(warmup_fraction=0.05),
        checkpoint=CheckpointConfig(every=200, init_from=str(out)),
    )


def _summary(
    source: HFCheckpoint, state: dict[str, Tensor], has_tokenizer: bool, out: Path
) -> list[str]:
    elements = sum(math.prod(t.shape) for t in source.tensors)
    lines = [f"read {len(source.tensors):,} tensors, {elements:,} elements"]
    lines += [f"left out: {what} ({count})" for what, count in sorted(source.left_out.items())]
    absent = [name for name in state if name not in source]
    if absent:
        lines.append(f"set to zero: {len(absent)} balancing biases, which this family lacks")
    if others := files_for_others(source.folder):
        names = ", ".join(map(str, others))
        lines.append(f"copied, but not read here: {names}")
    if not has_tokenizer:
        lines.append(
            f"no tokenizer.json in {source.folder}: set data.tokenizer in {out}/config.toml to the "
            "one of these weights; with another they mean nothing"
        )
    return lines
