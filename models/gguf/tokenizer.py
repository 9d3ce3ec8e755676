"""Converts the tokenizer in a GGUF file to a `tokenizer.json`.

GGUF stores the tokens and merges of a byte-level BPE, and the *name* of its pre-tokenizer, which
splits text into words; the rule itself is in llama.cpp's source (`llama-vocab.cpp`). Only known
rules are accepted: another split would silently produce other tokens. Tokens of llama.cpp's types
control and user-defined are matched whole, before the split. Special tokens, the tokens that begin
and end a text, chat templates and stop tokens are converted too.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from configs.errors import UserError
from models.gguf.file import GgufFile

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_CUTS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: _BYTES,
    # every digit separately, then GPT-2's words
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _BYTES]
    ),
}
"""llama.cpp's name of a rule -> the rule."""


_SPECIAL = {
    "bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "sep_token": "seperator",
    "pad_token": "padding", "mask_token": "mask",
}  # fmt: skip
"""Setting of tokenizer_config.json -> `tokenizer.ggml.<word>_token_id` (its own spelling)."""
_STOPS = ("eos", "eot", "eom")
"""Ends of a text, a turn, a message: llama.cpp stops at each."""
_TEMPLATE, _TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"


def write_gguf_tokenizer(file: GgufFile, folder: Path, vocab_size: int) -> dict[str, Any]:
    """Write `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`.

    vocab_size: rows of the embedding. Returns the special ids as in a config.json. Raises UserError
    if the file has another type of tokenizer, or refers to a token it does not have.
    """
    tokens, kinds = _strings(file, "tokenizer.ggml.tokens"), _kinds(file)
    if len(tokens) != vocab_size or len(set(tokens)) != len(tokens):
        raise UserError(
            f"{file.path}: tokenizer.ggml.tokens: {len(set(tokens))} different tokens of "
            f"{len(tokens)}, the embedding has {vocab_size} rows"
        )
    file.get("tokenizer.ggml.eos_token_id", int)
    ids = {key: _id(file, word, len(tokens)) for key, word in _SPECIAL.items()}
    stops = [_id(file, word, len(tokens)) for word in _STOPS]
    stops = list(dict.fromkeys(stop for stop in stops if stop is not None))
    special = {key: tokens[number] for key, number in ids.items() if number is not None}
    adds = {
        key: file.get(f"tokenizer.ggml.{key}", bool)
        for key in ("add_bos_token", "add_eos_token")
        if f"tokenizer.ggml.{key}" in file.metadata
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _build(file, tokens, kinds)
    _open_and_end(tokenizer, file.path, special, adds)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special, **adds}
    _write_json(folder / "tokenizer_config.json", settings | _templates(file))
    named = {f"{key}_id": ids[key] for key in ("bos_token", "eos_token", "pad_token")}
    said: dict[str, Any] = {key: number for key, number in named.items() if number is not None}
    if len(stops) > 1:
        said["eos_token_id"] = stops
    _write_json(folder / "generation_config.json", said)
    return said


def _id(file: GgufFile, word: str, n_tokens: int) -> int | None:
    """The id of a special token; None if the file has none."""
    key = f"tokenizer.ggml.{word}_token_id"
    if key not in file.metadata:
        return None
    number: int = file.get(key, int)
    if not 0 <= number < n_tokens:
        raise UserError(f"{file.path}: {key} = {number}: no such token")
    return number


def _open_and_end(
    tokenizer: Tokenizer, path: Path, special: dict[str, str], adds: dict[str, bool]
) -> None:
    """Make a text begin and end with the tokens that llama.cpp adds. Raises UserError."""
    wanted = [key for key, added in adds.items() if added]
    for key in wanted:
        if key.removeprefix("add_") not in special:
            raise UserError(
                f"{path}: tokenizer.ggml.{key} = true, but the file names no such token"
            )
    first, last = (
        special[key.removeprefix("add_")] if key in wanted else ""
        for key in ("add_bos_token", "add_eos_token")
    )
    if first or last:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[part for part in (first, "$A", last) if part],
            pair=[part for part in (first, "$A", last, first, "$B:1", last) if part],
            special_tokens=[(t, tokenizer.token_to_id(t)) for t in {first, last} if t],
        )


def _templates(file: GgufFile) -> dict[str, Any]:
    """The chat template, or several by name."""
    named = {}
    if _TEMPLATE in file.metadata:
        named["default"] = file.get(_TEMPLATE, str)
    if _TEMPLATES in file.metadata:
        names = _strings(file, _TEMPLATES)
        named |= {name: file.get(f"{_TEMPLATE}.{name}", str) for name in names}
    if not named:
        return {}
    if named.keys() == {"default"}:
        return {"chat_template": named["default"]}
    return {"chat_template": [{"name": name, "template": t} for name, t in named.items()]}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


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
    for token, kind in whole:  # all are in the vocabulary and keep their ids
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
