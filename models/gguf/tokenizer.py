"""The tokenizer that a GGUF file carries, as a `tokenizer.json`.

GGUF keeps the tokens and merges of a byte-level BPE, and the *name* of the rule that cuts text into
words; the rule itself lies in llama.cpp's source (`llama-vocab.cpp`). Only rules known here are
taken: another cut gives other tokens, silently. Tokens that llama.cpp calls control or user-defined
are matched whole, before the cut.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from configs.errors import UserError
from models.gguf.file import GgufFile

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_CUTS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: _BYTES,
    # every digit alone, then GPT-2's words
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _BYTES]
    ),
}
"""llama.cpp's name of a rule -> the rule."""


def write_gguf_tokenizer(file: GgufFile, folder: Path, vocab_size: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` (end of text, chat template).

    vocab_size: rows of the embedding. Raises UserError where the file has another kind of
    tokenizer.
    """
    tokens, kinds = _strings(file, "tokenizer.ggml.tokens"), _kinds(file)
    if len(tokens) != vocab_size or len(set(tokens)) != len(tokens):
        raise UserError(
            f"{file.path}: tokenizer.ggml.tokens: {len(set(tokens))} different tokens of "
            f"{len(tokens)}, the embedding has {vocab_size} rows"
        )
    eos = file.get("tokenizer.ggml.eos_token_id", int)
    if not 0 <= eos < len(tokens):
        raise UserError(f"{file.path}: tokenizer.ggml.eos_token_id = {eos}: no such token")
    folder.mkdir(parents=True, exist_ok=True)
    _build(file, tokens, kinds).save(str(folder / "tokenizer.json"))
    settings = {"eos_token": tokens[eos]}
    if "tokenizer.chat_template" in file.metadata:
        settings["chat_template"] = file.get("tokenizer.chat_template", str)
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, "utf-8")


def _build(file: GgufFile, tokens: list[str], kinds: list[int]) -> Tokenizer:
    cut = file.metadata.get("tokenizer.ggml.pre")
    if file.metadata.get("tokenizer.ggml.model") != "gpt2" or cut not in _CUTS:
        raise UserError(
            f"{file.path}: tokenizer.ggml.model = {file.metadata.get('tokenizer.ggml.model')!r}, "
            f"tokenizer.ggml.pre = {cut!r}: read are gpt2 with {' or '.join(_CUTS)}"
        )
    split = (merge.partition(" ") for merge in _strings(file, "tokenizer.ggml.merges"))
    merges = [(left, right) for left, _, right in split]
    try:
        bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{file.path}: tokenizer.ggml.merges: {error}") from None
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer, tokenizer.decoder = _CUTS[cut](), decoders.ByteLevel()
    whole = ((t, kind) for t, kind in zip(tokens, kinds, strict=True) if kind != _NORMAL)
    for token, kind in whole:  # all are in the vocabulary and keep their numbers
        special = kind == _CONTROL
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    return tokenizer


def _strings(file: GgufFile, key: str) -> list[str]:
    values: list[str] = file.get(key, list)
    if not all(type(value) is str for value in values):
        raise UserError(f"{file.path}: {key}: must be a list of strings")
    return values


def _kinds(file: GgufFile) -> list[int]:
    kinds: list[int] = file.get("tokenizer.ggml.token_type", list)
    unknown = {kind for kind in kinds if kind not in (_NORMAL, _CONTROL, _USER_DEFINED)}
    if unknown or len(kinds) != len(file.get("tokenizer.ggml.tokens", list)):
        raise UserError(
            f"{file.path}: tokenizer.ggml.token_type: one per token, normal (1), control (3) or "
            f"user-defined (4); found {sorted(unknown) or len(kinds)}"
        )
    return kinds
