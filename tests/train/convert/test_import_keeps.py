"""Import then export keeps the files of the weights: tokenizer, templates, generation settings."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from configs.errors import UserError
from serve.engine.loading import open_export
from tests.models.families import FAMILIES
from tests.models.hf.test_hf import random_decoder, write
from train.convert.hf_export import export_hf
from train.convert.hf_import import import_hf
from train.tokenizer.files import IMPORTED
from train.tokenizer.hf_files import export_tokenizer, keep_tokenizer

TOKENS = ["<unk>", "<s>", "</s>", "<|im_end|>", "<|tool|>", "<pad>", *map(chr, range(33, 91))]
GENERATION = {
    "_from_model_config": True, "bos_token_id": 1, "eos_token_id": [2, 3, 4], "pad_token_id": 5,
    "do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05,
    "repetition_penalty": 1.05, "max_length": 2048, "transformers_version": "4.51.0",
}  # fmt: skip
CONFIG = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 5,
          "max_position_embeddings": 131072}  # fmt: skip
DEFAULT = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
SETTINGS = {
    "bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "<pad>",
    "add_bos_token": True, "add_eos_token": False, "model_max_length": 131072,
    "padding_side": "left", "clean_up_tokenization_spaces": True,
    "tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<|tool|>"],
    "something_new": {"kept": [1, 2]},
}  # fmt: skip
OTHERS = ["vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json", "qwen.tiktoken"]


def published(folder: Path, templates: str = "files") -> Path:
    """A folder as published, with every file that a tokenizer can have."""
    folder.mkdir()
    write(random_decoder(FAMILIES["mixtral"]), folder)
    config = json.loads((folder / "config.json").read_text()) | CONFIG
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(TOKENS)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(TOKENS[:6])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = dict(SETTINGS)
    if templates == "string":
        settings["chat_template"] = DEFAULT
    elif templates == "list":
        settings["chat_template"] = [
            {"name": "default", "template": DEFAULT}, {"name": "tool_use", "template": "T"},
        ]  # fmt: skip
    else:
        (folder / "chat_template.jinja").write_text(DEFAULT)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=3))
    special = {k: v for k, v in SETTINGS.items() if k.endswith("_token") and isinstance(v, str)}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION, indent=1))
    for name in OTHERS:
        (folder / name).write_bytes(f"\x00 bytes of {name}".encode())
    return folder


def beside_weights(folder: Path) -> dict[str, bytes]:
    """Every file except the weights and config.json, by its path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)): path for path in files}
    return {n: p.read_bytes() for n, p in names.items()
            if "safetensors" not in n and n != "config.json"}  # fmt: skip


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("templates", ["files", "list", "string"])
def test_every_file_comes_out_as_it_went_in(templates: str, tmp_path: Path) -> None:
    folder = published(tmp_path / "hf", templates)
    _, lines = import_hf(folder, tmp_path / "ours")
    assert f"copied, but not read here: {', '.join(sorted(OTHERS))}" in lines
    out = export_hf(tmp_path / "ours", None, torch.float32)
    assert beside_weights(out) == beside_weights(folder)
    assert {key: config_of(out)[key] for key in CONFIG} == CONFIG
    assert open_export(out).end_tokens == {2, 3, 4}
    import_hf(out, tmp_path / "again")
    assert beside_weights(tmp_path / "again" / "tokenizer") == beside_weights(
        tmp_path / "ours" / "tokenizer"
    )


def test_transformers_renders_the_same_prompts(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = published(tmp_path / "hf")
    for name in OTHERS:  # they contain nothing
        (folder / name).unlink()
    import_hf(folder, tmp_path / "ours")
    chat, seen = [{"role": "user", "content": "HI"}], []
    for place in (folder, export_hf(tmp_path / "ours", None, torch.bfloat16)):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        generation = transformers.GenerationConfig.from_pretrained(place)
        seen.append(
            (
                [tokenizer.apply_chat_template(chat, tokenize=False, chat_template=name)
                 for name in ("default", "tool_use")],
                tokenizer.apply_chat_template(chat, return_dict=False, chat_template="default"),
                tokenizer.special_tokens_map, tokenizer.padding_side, tokenizer.model_max_length,
                tokenizer.decode([40, 41, 3]), generation.to_dict(),
            )
        )  # fmt: skip
    assert seen[0] == seen[1]
    assert seen[0][0] == ["<s>HI<|im_end|>", "T"]


def test_what_did_not_come_is_not_made_up(tmp_path: Path) -> None:
    """A base model: no template, no generation settings, no beginning-of-text token, one end
    token."""
    folder = published(tmp_path / "hf", "string")
    for name in ("generation_config.json", "special_tokens_map.json", *OTHERS):
        (folder / name).unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    bare = {k: v for k, v in config_of(folder).items() if k not in CONFIG} | {"eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(bare))
    import_hf(folder, tmp_path / "ours")
    out = export_hf(tmp_path / "ours", None, torch.float32)
    assert beside_weights(out) == beside_weights(folder)
    given = config_of(out)
    assert given["eos_token_id"] == 2 and not {"bos_token_id", "pad_token_id"} & given.keys()


def test_a_model_without_tokenizer_json(tmp_path: Path) -> None:
    """Its other files are copied, and exported again."""
    folder = published(tmp_path / "hf")
    (folder / "tokenizer.json").unlink()
    _, lines = import_hf(folder, tmp_path / "ours")
    assert any(line.startswith("no tokenizer.json in") for line in lines)
    exported = export_hf(tmp_path / "ours", None, torch.float32)
    assert beside_weights(exported) == beside_weights(folder)


def test_a_run_that_trains_on_passes_it_on(tmp_path: Path) -> None:
    """From import to run to export; a model trained from random weights uses only the tokenizer."""
    folder = published(tmp_path / "hf")
    import_hf(folder, tmp_path / "ours")
    file = tmp_path / "ours" / "tokenizer" / "tokenizer.json"
    for given in (file, tmp_path / "run" / "tokenizer.json"):  # the second: its own folder
        keep_tokenizer(given, tmp_path / "run", 32, trains_on=True)
        assert beside_weights(tmp_path / "run") == beside_weights(file.parent)

    keep_tokenizer(file, tmp_path / "new run", 32, trains_on=False)
    assert IMPORTED not in beside_weights(tmp_path / "new run")
    ids = export_tokenizer(file, tmp_path / "new", 32)
    assert ids == {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 5}
    kept = beside_weights(tmp_path / "new")
    assert not {IMPORTED, "generation_config.json", "tokenizer.model"} & kept.keys()
    settings = json.loads(kept["tokenizer_config.json"])
    same = ("bos_token", "eos_token", "unk_token", "pad_token", "add_bos_token", "padding_side")
    assert {key: settings[key] for key in same} == {key: SETTINGS[key] for key in same}
    assert settings["model_max_length"] == 32
    assert {entry["name"] for entry in settings["chat_template"]} == {"default", "tool_use"}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("wrong", ["2", [2, "3"], True, {"a": 1}, 2.0])
def test_special_ids_that_are_none(file: str, wrong: object, tmp_path: Path) -> None:
    folder = published(tmp_path / "hf")
    content = json.loads((folder / file).read_text()) | {"eos_token_id": wrong}
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=rf"hf/{file}: eos_token_id = .*must be (an integer|integers)"
    ):
        import_hf(folder, tmp_path / "ours")
    assert not list(tmp_path.glob("*ours*"))
    if file == "generation_config.json":
        with pytest.raises(UserError, match="eos_token_id"):
            open_export(folder)


def test_files_that_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder, secret = published(tmp_path / "hf"), tmp_path / "secret"
    secret.write_text("{}")
    for name in ("generation_config.json", "merges.txt", "additional_chat_templates/x.jinja"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
        with pytest.raises(UserError, match="leads out of the folder"):
            import_hf(folder, tmp_path / "ours")
        (folder / name).unlink()
    shutil.rmtree(folder / "additional_chat_templates")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "x.jinja").write_text("x")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "far")
    with pytest.raises(UserError, match="leads out of the folder"):
        import_hf(folder, tmp_path / "ours")
