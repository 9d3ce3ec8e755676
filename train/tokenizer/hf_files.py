"""The files next to a tokenizer.json in a Hugging Face folder: special tokens, chat template.

An existing tokenizer keeps its special tokens, padding side and chat templates: they are copied
from its folder into the run and the export. For an imported model all files are copied, byte for
byte (`train.tokenizer.files`). If there is no chat template, the one below is written. It writes
the roles as words, because a pretrained model has been trained on words, while reserved tokens such
as ChatML's would still have their initial embeddings. The end-of-text token begins the chat, as it
begins every document in training, and ends each answer, so that a model fine-tuned with this
template stops by itself.

The template is written twice, as in transformers since version 4.51 (chat_template.jinja) and as
before (a key of tokenizer_config.json), because both types of reader are in use.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from configs.errors import UserError
from train.tokenizer.files import SPECIAL_IDS, TEMPLATES, imported, pass_on
from train.tokenizer.padding import PAD, with_padding
from train.tokenizer.tokenizer import SPECIAL_FILE, load_tokenizer, settings_beside, token_name

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set text = (message['content'] or '') | trim %}
    {%- if message['role'] == 'assistant' %}
        {{- 'Assistant: ' + text + eos_token }}
    {%- elif message['role'] == 'user' %}
        {{- 'User: ' + text + '\\n\\n' }}
    {%- else %}
        {{- text + '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}
"""
_TEMPLATE_FILE = "chat_template.jinja"
_TOKENS = tuple(key.removesuffix("_id") for key in SPECIAL_IDS)
_KEPT = (
    "unk_token", "sep_token", "cls_token", "mask_token", "additional_special_tokens",
    "extra_special_tokens", "added_tokens_decoder", "padding_side", "truncation_side",
    "add_bos_token", "add_eos_token", "model_input_names", "clean_up_tokenization_spaces",
)  # fmt: skip
"""Settings of an existing tokenizer that apply to any model trained with it. Its class is not one
of them: training reads tokenizer.json directly, and PreTrainedTokenizerFast does the same."""


def files_beside(file: Path) -> list[Path]:
    """The files with the settings to keep for the tokenizer.json `file`, itself included."""
    folder = file.parent
    named = [file, folder / "tokenizer_config.json", folder / _TEMPLATE_FILE]
    if "eos_token" not in settings_beside(file):  # otherwise it does not affect a corpus
        named.append(folder / SPECIAL_FILE)
    return [path for path in named if path.is_file()] + _further_templates(folder)


def kept_settings(file: Path, eot: str) -> dict[str, Any]:
    """The settings of a tokenizer to keep, for the tokenizer_config.json of a copy.

    file: a tokenizer.json. eot: its end-of-text token. Raises UserError.
    """
    settings, older = settings_beside(file), settings_beside(file, SPECIAL_FILE)
    # as in transformers, the older file has priority over settings without the added tokens
    given = older | settings if "added_tokens_decoder" in settings else settings | older
    kept = {key: given[key] for key in _KEPT if key in given}
    kept |= {key: token_name(given[key]) or None for key in _TOKENS if key in given}
    kept["eos_token"] = eot
    template = _chat_template(file.parent, settings)
    return kept if template is None else kept | {"chat_template": template}


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """One template, or several by name; files have priority over the key, as in transformers."""
    template = settings.get("chat_template")
    entries = template if isinstance(template, list) else [{"name": "", "template": template or ""}]
    if not all(
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
        for entry in entries
    ):
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a string, or a list of "
            'objects with the strings "name" and "template"'
        )
    named = {entry["name"] or "default": entry["template"] for entry in entries}
    files = [path for path in (folder / _TEMPLATE_FILE,) if path.is_file()]
    for path in files + _further_templates(folder):
        named["default" if path in files else path.stem] = _text(path)
    named = {name: text for name, text in named.items() if text}
    if not named.keys() - {"default"}:
        return named.get("default")
    return [{"name": name, "template": text} for name, text in named.items()]


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not valid UTF-8") from None


def _further_templates(folder: Path) -> list[Path]:
    return sorted((folder / TEMPLATES).glob("*.jinja"))


def keep_tokenizer(file: Path, folder: Path, max_positions: int, *, trains_on: bool) -> None:
    """Write the tokenizer.json `file` and its settings into a run's `folder`.

    trains_on: whether the run begins with the weights imported with the tokenizer; then all files
    imported with them are copied unchanged. Otherwise as `export_tokenizer`, but without the
    padding token: tokenizer.json is unchanged, because it is part of the data's identity.
    """
    if trains_on and imported(file.parent) is not None:
        pass_on(file.parent, folder, with_imported=True)
    else:
        _write(file, folder, max_positions, add_padding=False)


def export_tokenizer(file: Path, folder: Path, max_positions: int) -> dict[str, int | None]:
    """Write the files from which transformers' AutoTokenizer builds the same tokenizer.

    max_positions: longest sequence of the model, in tokens. Returns the ids of its special tokens
    under the names of config.json; null if there is none, because an architecture may have other
    defaults.
    """
    return _write(file, folder, max_positions, add_padding=True)


def _write(
    file: Path, folder: Path, max_positions: int, *, add_padding: bool
) -> dict[str, int | None]:
    tokenizer, eot = load_tokenizer(file, vocab_size=2**31)
    kept = kept_settings(file, eot)
    if "chat_template" not in kept:
        kept["chat_template"] = CHAT_TEMPLATE
        kept.setdefault("bos_token", eot)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "tokenizer.json"
    if not (target.exists() and target.samefile(file)):
        shutil.copyfile(file, target)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    pad = token_name(kept.get("pad_token"))
    padded = with_padding(tokenizer) if pad in ("", eot) else None
    if pad not in vocabulary or padded is not None:
        kept.pop("pad_token", None)  # readers would give it a row that the embedding lacks
    if padded is not None and add_padding:
        padded.save(str(target))
        kept["pad_token"] = PAD
        vocabulary = padded.get_vocab(with_added_tokens=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
    }
    special = {key: kept[key] for key in _TOKENS if key in kept}
    others = {key: value for key, value in kept.items() if key not in special}
    _write_json(folder / "tokenizer_config.json", settings | others | special)
    _write_json(folder / SPECIAL_FILE, special)
    # of several templates the file could contain only one, and transformers would read no other
    (folder / _TEMPLATE_FILE).unlink(missing_ok=True)
    template = kept["chat_template"]
    if isinstance(template, str):
        (folder / _TEMPLATE_FILE).write_text(template, "utf-8")
    return {f"{key}_id": vocabulary.get(special.get(key) or "") for key in _TOKENS}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
