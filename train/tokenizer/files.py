"""The files of a Hugging Face folder that are copied unchanged with its weights.

An imported model keeps its original files: its tokenizer in every form, chat templates, special
tokens and generation settings. These files are copied, byte for byte, from the folder into the
import, from there into each run that continues training, and into every export. Keys of
`config.json` that are not settings of the model (special ids, longest sequence) are copied in a
separate file, `IMPORTED`.

A tokenizer that is only specified (`data.tokenizer`) contributes only its own files
(`train.tokenizer.hf_files`): sampling settings are a property of the model.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from configs.errors import UserError
from models.hf.folder import inside, read_json

IMPORTED = "imported.json"
GENERATION = "generation_config.json"
TEMPLATES = "additional_chat_templates"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LONGEST = "max_position_embeddings"
_READ = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", GENERATION)
_FOR_OTHERS = (
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tekken.json", "*.model",
    "*.model.v*", "*.tiktoken",
)  # fmt: skip
_PATTERNS = (*_READ, "chat_template.jinja", "chat_template.json", f"{TEMPLATES}/*.jinja")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer in `folder`, relative to it."""
    return _found(folder, (*_PATTERNS, *_FOR_OTHERS))


def files_for_others(folder: Path) -> list[Path]:
    """Those of them that only other programs read."""
    return _found(folder, _FOR_OTHERS)


def take_over(folder: Path, target: Path, config: dict[str, Any]) -> None:
    """Copy the files that belong to the weights in `folder` into the new folder `target`.

    config: of the language model. Raises UserError if a file is outside the folder, or a special id
    is invalid.
    """
    target.mkdir(parents=True)
    given = {key: config[key] for key in (*SPECIAL_IDS, _LONGEST) if key in config}
    _check_ids(given, folder / "config.json")
    for path in tokenizer_files(folder):
        place = inside(folder, path.as_posix())
        (target / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(place, target / path)
    if (target / GENERATION).is_file():
        _check_ids(read_json(target / GENERATION), folder / GENERATION)
    note_imported(target, given)


def note_imported(target: Path, said: dict[str, Any]) -> None:
    """Write the keys of config.json that are no settings of the model to `target` (see
    `imported`)."""
    (target / IMPORTED).write_text(json.dumps(said, indent=2) + "\n", "utf-8")


def imported(folder: Path) -> dict[str, Any] | None:
    """The keys of an imported model's config.json that are no settings of the model, or None if the
    tokenizer in `folder` was not imported with a model."""
    try:
        return read_json(folder / IMPORTED)
    except FileNotFoundError:
        return None


def longest_sequence(said: dict[str, Any]) -> int:
    """Positions that an imported model was trained for; 0 if no usable key specifies it."""
    longest = said.get(_LONGEST)
    return longest if type(longest) is int and 2 <= longest < 2**31 else 0


def pass_on(folder: Path, target: Path, *, with_imported: bool) -> None:
    """Copy the files of `take_over` from `folder` to `target`.

    with_imported: also the file that allows copying from `target` in turn.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in (*tokenizer_files(folder), *([Path(IMPORTED)] if with_imported else [])):
        (target / path).parent.mkdir(exist_ok=True)
        if not ((target / path).exists() and (target / path).samefile(folder / path)):
            shutil.copyfile(folder / path, target / path)


def _found(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder) for path in found)


def _check_ids(given: dict[str, Any], place: Path) -> None:
    for key in SPECIAL_IDS:
        ids = given.get(key)
        listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(token) is int for token in listed):
            raise UserError(
                f"{place}: {key} = {str(ids)[:80]!r}: must be an integer or a list of integers"
            )
