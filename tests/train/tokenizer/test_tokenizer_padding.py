"""The padding token of a tokenizer trained here: a separate token, and no text changes its ids."""

import json
from pathlib import Path
from random import Random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.train.tokenizer.test_tokenizer import save, texts, train
from train.tokenizer.hf_files import export_tokenizer, keep_tokenizer
from train.tokenizer.padding import PAD, with_padding
from train.tokenizer.tokenizer import EOT, cuts_words_as_ours, load_tokenizer


def test_every_text_keeps_its_ids() -> None:
    tokenizer = train()
    padded = with_padding(tokenizer)
    assert padded is not None
    assert padded.get_vocab_size() == tokenizer.get_vocab_size() == 300
    pad = tokenizer.get_vocab()["ÿ"]
    assert padded.token_to_id(PAD) == pad and padded.id_to_token(pad) == PAD
    rest = {token: i for token, i in tokenizer.get_vocab().items() if i != pad}
    assert rest == {token: i for token, i in padded.get_vocab().items() if i != pad}
    rng = Random(5)
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    samples = ["".join(map(chr, range(i, i + 32))) for i in range(0, 0x800, 32)]
    samples += [*texts(5, seed=9), "Lÿon ÿÿ", f"a{EOT}b"]
    samples += ["".join(chr(rng.choice(points)) for _ in range(20)) for _ in range(200)]
    for text in samples:
        ids = tokenizer.encode(text).ids
        assert padded.encode(text).ids == ids and pad not in ids
        assert padded.decode(ids) == tokenizer.decode(ids)
    assert padded.encode(f"a{PAD}b").ids.count(pad) == 1, "as the other special token"
    assert cuts_words_as_ours(padded)
    again = with_padding(padded)
    assert again is not None and again.to_str() == padded.to_str()


def test_only_tokenizers_trained_here_get_one() -> None:
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    other = Tokenizer(models.BPE({name: i for i, name in enumerate([EOT, *names])}, []))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert with_padding(other) is None
    parts = json.loads(train().to_str())
    parts["added_tokens"].append(parts["added_tokens"][0] | {"id": 300, "content": "Lÿon"})
    assert with_padding(Tokenizer.from_str(json.dumps(parts))) is None


def test_a_run_keeps_the_tokenizer_of_its_corpus(tmp_path: Path) -> None:
    """A resumed run compares its bytes; it does not mention padding."""
    file = save(train(), tmp_path / "corpus", EOT)
    for given in (file, tmp_path / "run" / "tokenizer.json"):
        keep_tokenizer(given, tmp_path / "run", 64, trains_on=True)
        assert (tmp_path / "run" / "tokenizer.json").read_bytes() == file.read_bytes()
        assert "pad_token" not in json.loads((tmp_path / "run/tokenizer_config.json").read_text())
    ids = export_tokenizer(tmp_path / "run" / "tokenizer.json", tmp_path / "export", 64)
    assert ids["pad_token_id"] not in (None, ids["eos_token_id"])


def test_a_run_of_before_gets_one_when_it_is_exported(tmp_path: Path) -> None:
    """Its tokenizer folder sets the padding token to the end of text."""
    file = save(train(), tmp_path / "tokenizer", EOT)
    old = {"bos_token": EOT, "eos_token": EOT, "pad_token": EOT, "chat_template": "x"}
    (file.parent / "tokenizer_config.json").write_text(json.dumps(old))
    ids = export_tokenizer(file, tmp_path / "export", 64)
    settings = json.loads((tmp_path / "export" / "tokenizer_config.json").read_text())
    assert settings["pad_token"] == PAD and settings["eos_token"] == settings["bos_token"] == EOT
    exported, eot = load_tokenizer(tmp_path / "export" / "tokenizer.json", 300)
    assert eot == EOT and exported.token_to_id(PAD) == ids["pad_token_id"] != ids["eos_token_id"]
    files = sorted(path.name for path in (tmp_path / "export").iterdir())
    export_tokenizer(tmp_path / "export" / "tokenizer.json", tmp_path / "again", 64)
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "export" / name).read_bytes()


def test_the_usual_collator_keeps_the_end_of_each_answer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    export_tokenizer(save(train(), tmp_path / "run"), tmp_path / "export", 512)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    rows = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": answer}],
            return_dict=False,
        )
        for answer in ("4", "four, or so I was told")
    ]
    assert [row[-1] for row in rows] == [0, 0], "each answer ends with the end of text"
    labels = collator([{"input_ids": row} for row in rows])["labels"].tolist()
    for row, label in zip(rows, labels, strict=True):
        assert label == row + [-100] * (len(label) - len(row))


@pytest.mark.parametrize("pad", [None, "<|endoftext|>", "[PAD]"])
def test_a_tokenizer_of_others_keeps_what_it_says(pad: str | None, tmp_path: Path) -> None:
    """This includes padding with the end of text, but no token without a row in the embedding."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, EOT: 1}, "a"))
    file = save(tokenizer, tmp_path / "given")
    said = {"eos_token": EOT, "bos_token": None, "padding_side": "left", "chat_template": "x"}
    (file.parent / "tokenizer_config.json").write_text(json.dumps(said | {"pad_token": pad}))
    ids = export_tokenizer(file, tmp_path / "export", 64)
    assert ids["bos_token_id"] is None and ids["eos_token_id"] == 1
    assert ids["pad_token_id"] == (1 if pad == EOT else None)
    settings = json.loads((tmp_path / "export" / "tokenizer_config.json").read_text())
    assert settings.get("pad_token") == (EOT if pad == EOT else None)
    assert settings["padding_side"] == "left" and settings["bos_token"] is None
    copy, given = (path / "tokenizer.json" for path in (tmp_path / "export", file.parent))
    assert copy.read_bytes() == given.read_bytes()
