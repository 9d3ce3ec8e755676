"""What stands beside a tokenizer.json in a Hugging Face folder: special tokens, chat template.

A given tokenizer keeps its own chat template and padding token: they travel from its folder into
the corpus, the run and the export. Where there is no template, the one below is written. It spells
the roles as words, because a pretrained model has seen words, while reserved tokens such as
ChatML's would still have the embeddings they were initialised with. The end-of-text token opens the
chat, as it opens every document in training, and ends each answer, so that a model fine-tuned with
this template stops by itself.

The template is written twice, as transformers does since version 4.51 (chat_template.jinja) and as
it did before (a key of tokenizer_config.json), because both kinds of reader are about.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from configs.rules import ConfigError
from train.tokenizer import load_tokenizer, settings_beside, token_name

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


def files_beside(file: Path) -> list[Path]:
    """The files that say what is to be kept with the tokenizer.json `file`, itself included."""
    folder = file.parent
    named = (file, folder / "tokenizer_config.json", folder / _TEMPLATE_FILE)
    return [path for path in named if path.is_file()] + _further_templates(folder)


def kept_settings(file: Path, eot: str) -> dict[str, Any]:
    """What of a tokenizer's settings is kept, for the tokenizer_config.json of a copy.

    file: a tokenizer.json. eot: its end-of-text token. Raises ConfigError.
    """
    settings = settings_beside(file)
    kept: dict[str, Any] = {"eos_token": eot}
    if pad := token_name(settings.get("pad_token")):
        kept["pad_token"] = pad
    template = _chat_template(file.parent, settings)
    return kept if template is None else kept | {"chat_template": template}


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """One template, or several by name; files outweigh the key, as they do in transformers."""
    template = settings.get("chat_template")
    if (folder / _TEMPLATE_FILE).is_file():
        template = (folder / _TEMPLATE_FILE).read_text("utf-8")
    if further := _further_templates(folder):
        default = [{"name": "default", "template": template}] if template else []
        more = [{"name": path.stem, "template": path.read_text("utf-8")} for path in further]
        template = default + more
    entries = template if isinstance(template, list) else [{"name": "", "template": template or ""}]
    if not all(
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
        for entry in entries
    ):
        raise ConfigError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a string, or a list of "
            'objects with the strings "name" and "template"'
        )
    return template


def _further_templates(folder: Path) -> list[Path]:
    return sorted((folder / "additional_chat_templates").glob("*.jinja"))


def export_tokenizer(tokenizer_file: Path, folder: Path, max_positions: int) -> dict[str, int]:
    """Write the files from which transformers' AutoTokenizer builds the same tokenizer.

    max_positions: longest sequence of the model, in tokens. Returns the ids of its special tokens
    under the names of generation_config.json.
    """
    tokenizer, eot = load_tokenizer(tokenizer_file, vocab_size=2**31)
    kept = kept_settings(tokenizer_file, eot)
    template = kept.setdefault("chat_template", CHAT_TEMPLATE)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "tokenizer.json"
    if not (target.exists() and target.samefile(tokenizer_file)):
        shutil.copyfile(tokenizer_file, target)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    pad = kept.get("pad_token", eot)
    special = {
        "bos_token": eot,
        "eos_token": eot,
        "pad_token": pad if pad in vocabulary else eot,
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings | kept | special)
    _write_json(folder / "special_tokens_map.json", special)
    # of several templates the file could hold but one, and transformers would read no other
    (folder / _TEMPLATE_FILE).unlink(missing_ok=True)
    if isinstance(template, str):
        (folder / _TEMPLATE_FILE).write_text(template, "utf-8")
    return {f"{name}_id": vocabulary[token] for name, token in special.items()}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
