"""Opening an exported folder: weights, tokenizer, end tokens, longest sequence."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from configs.errors import UserError
from kernels.device import missing_triton
from models.decoder import Decoder
from models.hf.files import read_config, read_model
from models.hf.folder import inside, read_json
from models.hf.messages import one_line, shown
from serve.engine.rank_group import Command, RankGroup

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}
"""Our dtype names and those of `config.json`."""


@dataclass(frozen=True)
class Export:
    """The contents of an export, ready to run."""

    name: str
    model: Decoder
    tokenizer: Tokenizer | None
    """None if the folder has no `tokenizer.json`: prompts must then be token ids."""
    end_tokens: frozenset[int]
    """Tokens that end a text."""
    max_length: int
    """Maximum length of prompt and output together: later positions were never trained."""
    dtype: torch.dtype
    device: torch.device
    model_type: str | None = None
    """From config.json, as `architectures`: transformers' names."""
    architectures: tuple[str, ...] = ()
    group: RankGroup | None = None
    """The ranks that divide the model; None for one process."""
    keeps_fp8: bool = False
    """Whether weights in FP8 blocks are kept in FP8."""

    @property
    def highest_token(self) -> int:
        """The tokenizer's highest token: further ones of a padded vocabulary are never sampled."""
        if self.tokenizer is None:
            return self.model.config.vocab_size - 1
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values())


def open_export(
    folder: Path, dtype: str = "auto", device: str = "auto", group: RankGroup | None = None
) -> Export:
    """Read an export.

    Args:
        folder: The export.
        dtype: `auto` (that of the export, in which weights in FP8 blocks stay in FP8), `fp32` or
            `bf16`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`; with a group it is that of the rank.
        group: Ranks that divide the model; each reads its part of the weights.

    Raises UserError: one line with the file and its error.
    """
    model_config, raw = read_config(folder)
    place = folder / "config.json"
    max_length = raw.get("max_position_embeddings")
    if type(max_length) is not int or max_length < 2:
        raise UserError(f"{place}: max_position_embeddings must be an integer of at least 2")
    tokenizer = open_tokenizer(folder / "tokenizer.json", model_config.vocab_size)
    kind = _dtype(dtype, raw, place)
    where = _device(device) if group is None else group.ranks.device
    fp8 = dtype == "auto" and kind == torch.bfloat16
    return Export(
        name=folder.resolve().name,
        model=read_model(
            folder, kind, where, fp8=fp8, sharding=None if group is None else group.sharding
        ),
        tokenizer=tokenizer,
        end_tokens=_end_tokens(folder, raw),
        max_length=max_length,
        dtype=kind,
        device=where,
        model_type=raw.get("model_type"),
        architectures=tuple(raw.get("architectures") or ()),
        group=group,
        keeps_fp8=fp8,
    )


def load_update(old: Export, folder: Path) -> Export:
    """`old` with the weights of another folder, for the same model, dtype, device and ranks. The
    folder needs no tokenizer. Rank 0 lets the other ranks load it, too. Raises UserError, on all
    ranks, if the models differ; nothing of another model is read."""

    def load() -> Export:
        config, raw = read_config(folder)
        if replace(config, mtp_depth=0) != old.model.config:
            raise UserError(f"{folder}: is another model than the one that is served")
        if raw.get("max_position_embeddings") != old.max_length:
            raise UserError(
                f"{folder / 'config.json'}: max_position_embeddings must be {old.max_length}, as "
                "in the export that is served"
            )
        sharding = None if old.group is None else old.group.sharding
        model = read_model(folder, old.dtype, old.device, fp8=old.keeps_fp8, sharding=sharding)
        return replace(old, model=model)

    if old.group is None:
        return load()
    with old.group.watched():
        if old.group.ranks.is_first:
            old.group.send(Command.LOAD, text=str(folder.absolute()))
        export: Export = old.group.ranks.on_every(load)
        return export


def _dtype(dtype: str, raw: dict[str, Any], place: Path) -> torch.dtype:
    name = raw.get("dtype") or raw.get("torch_dtype") if dtype == "auto" else dtype
    if name not in DTYPES:
        raise UserError(f"{place}: dtype = {shown(name)}: choose one with --dtype fp32 or bf16")
    return DTYPES[name]


def _device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        usable = found.type in ("cpu", "cuda") and torch.empty(1, device=found) is not None
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise UserError(f"--device {device}: must be auto, cpu, or a cuda device that is here")
    if found.type == "cuda" and (problem := missing_triton()):
        raise UserError(f"--device {device}: {problem}; or use --device cpu")
    return found


def open_tokenizer(path: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of an export; None if it has none. Raises UserError."""
    if not inside(path.parent, path.name).exists():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer: {one_line(error)}") from None
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest < 0:
        raise UserError(f"{path}: has no tokens")
    if highest >= vocab_size:
        raise UserError(
            f"{path}: has token {highest}, the model only {vocab_size} tokens: "
            "is it the tokenizer of another model?"
        )
    tokenizer.no_truncation()  # a prompt that is too long is an error, not cut
    tokenizer.no_padding()
    return tokenizer


def _end_tokens(folder: Path, raw: dict[str, Any]) -> frozenset[int]:
    """From generation_config.json if it has them, else from config.json; there may be none."""
    place, found = folder / "config.json", raw.get("eos_token_id")
    path = folder / "generation_config.json"
    try:
        generation = read_json(path).get("eos_token_id")
    except FileNotFoundError:
        generation = None
    if generation is not None:
        place, found = path, generation
    if found is None:
        return frozenset()
    tokens = found if isinstance(found, list) else [found]
    if not all(type(token) is int for token in tokens):
        raise UserError(f"{place}: eos_token_id = {shown(found)}: must be an integer or integers")
    return frozenset(tokens)
