"""The tokenizer: guarantees of training, encoding compared with the library, export to
transformers."""

import json
import keyword
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, models, normalizers, pre_tokenizers

from configs.errors import UserError
from tests.runs import run
from train.tokenizer import tokenizer as subject
from train.tokenizer.hf_files import export_tokenizer, files_beside
from train.tokenizer.tokenizer import EOT, Encoder, find_tokenizer, load_tokenizer

UINT16 = np.dtype(np.uint16)


def texts(count: int = 60, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = [*keyword.kwlist, "self.value", "x = 1", "range(10):", "élan", "数", "'s", "42"]
    return [
        "".join(rng.choice(words) + rng.choice([" ", "\n", "\n    "]) for _ in range(80))
        for _ in range(count)
    ]


def train(vocab_size: int = 300, documents: list[str] | None = None) -> Tokenizer:
    documents = documents if documents is not None else texts()
    return subject.train_tokenizer(lambda: documents, vocab_size, lambda line: None)


def test_trained_vocabulary() -> None:
    tokenizer = train()
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.token_to_id(EOT) == 0
    text = "def f():\n\treturn 'naïve 数 \U0001f600\x00'\r\n"
    ids = tokenizer.encode(text).ids
    assert ids[0] == 0 and 0 not in ids[1:]
    assert tokenizer.decode(ids) == text
    assert tokenizer.to_str() == train().to_str()
    assert json.loads(tokenizer.to_str())["model"]["ignore_merges"]  # as llama.cpp does


def test_training_takes_a_sample_and_more_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "SAMPLE_BYTES", 2000)
    lines: list[str] = []
    subject.train_tokenizer(texts, 280, lines.append)
    assert "60 documents" not in lines[0]
    rare = ["abc " * 600, *texts()]  # the sample has only three pairs to merge
    subject.train_tokenizer(lambda: rare, 280, lines.append)
    assert "from 61 documents" in lines[1]


def test_a_vocabulary_that_cannot_be() -> None:
    with pytest.raises(UserError, match="at least 257"):
        train(256)
    with pytest.raises(UserError, match=r"set model.vocab_size to \d+ or") as caught:
        train(1000, ["hello hello world"])
    works = int(str(caught.value).split("set model.vocab_size to ")[1].split()[0])
    assert train(works, ["hello hello world"]).get_vocab_size() == works


def unruly(count: int) -> list[str]:
    """Random texts of every kind of space, quote, letter and digit, ASCII and not."""
    rng = random.Random(0)
    parts = [chr(i) for i in range(128)] + ["'s", "'ll", "'LL", " a", "\n\n", "   ", EOT]
    parts += [".\n\n", "12345", "\t", ")\r\n", "'Re"]
    others = "é 数 \u00a0 \u2003 \u0085 ² ½ Ⅷ \u0301 \U0001f600 \u3000".split(" ")
    made = []
    for _ in range(count):
        pool = rng.choices(parts + others if rng.random() < 0.6 else parts, k=30)
        pool += list(rng.choice([" \nab'1", "\n é", "'stmdrevl ", "\n\x1c\x0b\x85 x"])) * 10
        made.append("".join(rng.choices(pool, k=rng.randrange(60))))
    return made


# Of Llama 3's published tokenizer.json. Its (?i:) also takes \u017f for an s, llama.cpp does not.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_words_are_llama_3s() -> None:
    ours, theirs = (
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (subject.WORDS, LLAMA_3)
    )
    characters = [chr(i) for i in range(0x3100) if i != 0x17F]  # most scripts, all spaces
    pairs = [f"a{c} {c}{c}1'{c}\n{c}'LL {c}\n" for c in characters]
    for text in (*unruly(500), *texts(5), *pairs):
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text), repr(text)


def test_encoder_equals_the_library() -> None:
    documents = unruly(2000)
    tokenizer = train(1500, documents)  # tokens that a wrong split would break
    encoder = Encoder(Tokenizer.from_str(tokenizer.to_str()), 0, UINT16)
    assert encoder.by_words
    tokenizer.encode_special_tokens = True
    for start in range(0, len(documents), 100):
        chunk = documents[start : start + 100]
        expected: list[int] = []
        for encoding in tokenizer.encode_batch(chunk, add_special_tokens=False):
            expected += [0, *encoding.ids]
        stream = encoder.encode(chunk)
        assert stream.dtype == UINT16
        assert stream.tolist() == expected
    assert encoder.encode([]).tolist() == []


def test_the_table_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_MOST_WORDS", 20)
    encoder = Encoder(train(), 0, UINT16)
    documents = [f"word{i} other{i}" for i in range(200)]
    streams = [encoder.encode([text]) for text in documents]
    assert len(encoder.ids_of) < 40
    whole = Encoder(train(), 0, UINT16).encode(documents)
    assert np.array_equal(np.concatenate(streams), whole)


class Recorded:
    """A tokenizer that notes the most characters it had to encode at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.most = tokenizer, 0

    def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> list[Encoding]:
        self.most = max(self.most, sum(map(len, texts)))
        found: list[Encoding] = self.tokenizer.encode_batch_fast(
            texts, add_special_tokens=add_special_tokens
        )
        return found


def test_the_library_encodes_a_long_document_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs 200 bytes of memory for each character that it encodes at once."""
    monkeypatch.setattr(subject, "_GROUP", 400)
    tokenizer = train()
    document = "".join(f"größe {i} 数\n\n  \t\n  wert{i}: ä\n" for i in range(300))
    expected = [0, *tokenizer.encode(document, add_special_tokens=False).ids]
    encoder = Encoder(tokenizer, 0, UINT16)
    recorded = Recorded(encoder.tokenizer)
    monkeypatch.setattr(encoder, "tokenizer", recorded)
    assert encoder.encode([document]).tolist() == expected
    assert encoder.encode([document, document]).tolist() == expected * 2
    assert 300 < recorded.most <= 400


def test_training_takes_the_beginning_of_a_long_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "SAMPLE_BYTES", 4000)
    documents = unruly(2000)
    long = "".join(text for text in documents if text.isascii())
    assert len(long) > 8000
    assert train(300, [long]).to_str() == train(300, [long[:4000]]).to_str()


def save(tokenizer: Tokenizer, folder: Path, eos: object = None) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    if eos is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return folder / "tokenizer.json"


def plain(*special: str) -> Tokenizer:
    """A tokenizer that splits at white space only, so the shortcut by words must not be used."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "</s>x": 3}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def test_a_given_tokenizer(tmp_path: Path) -> None:
    file = save(plain("</s>", "<end>"), tmp_path / "a")
    assert find_tokenizer(str(tmp_path / "a")) == find_tokenizer(str(file)) == file
    given, eot = load_tokenizer(file, 6)
    assert eot == "</s>"
    given.enable_truncation(2)
    encoder = Encoder(given, 4, UINT16)
    assert not encoder.by_words
    assert encoder.encode(["a b a", "b </s>"]).tolist() == [4, 1, 2, 1, 4, 2, 0]
    for number, eos in enumerate(("<end>", {"content": "<end>"})):
        file = save(plain("</s>", "<end>"), tmp_path / str(number), eos)
        assert load_tokenizer(file, 6)[1] == "<end>"


def forging(kind: str) -> tuple[Tokenizer, str]:
    """A tokenizer whose end-of-text token can be written in documents, and the token."""
    if kind == "not special":
        tokenizer = train()
        tokenizer.add_tokens([AddedToken("<end>", special=False)])
        return tokenizer, "<end>"
    if kind == "not special, normalized":
        tokenizer = plain()
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.add_tokens([AddedToken("<end>", special=False, normalized=True, lstrip=True)])
        return tokenizer, "<end>"
    if kind == "word":
        return plain("<other>"), "</s>x"
    if kind == "word of a normalizer":
        tokenizer = plain()
        tokenizer.normalizer = normalizers.Lowercase()
        return tokenizer, "</s>x"
    if kind == "piece":  # as in T5's vocabulary
        pieces = [("<unk>", -9.0), ("</s>", 0.0), *((c, -4.0) for c in " </s>abcend")]
        return Tokenizer(models.Unigram(pieces, 0)), "</s>"
    assert kind == "merged"  # splits words as ours does, and a word that is a token gets that token
    parts = json.loads(train().to_str())
    parts["model"]["vocab"]["#!#"] = 300
    return Tokenizer.from_str(json.dumps(parts)), "#!#"


FORGING = [
    "not special", "not special, normalized", "word", "word of a normalizer", "piece", "merged",
]  # fmt: skip


@pytest.mark.parametrize("kind", FORGING)
def test_no_document_forges_a_boundary(kind: str) -> None:
    tokenizer, name = forging(kind)
    eot = tokenizer.token_to_id(name)
    assert eot is not None
    documents = [
        f"a {name} b", name, name * 3, f"{name} {name}", f"a\n{name}\nb é {name}", "a b", "",
        f"a {name.upper()} b", f" {name} ", f"é {name}", f"{name[0]}{name}{name[-1]}",
    ]  # fmt: skip
    before = tokenizer.to_str()
    assert any(eot in tokenizer.encode(t, add_special_tokens=False).ids for t in documents)
    encoder = Encoder(tokenizer, eot, UINT16)
    for chunk in (documents, documents[::-1], [f" a{text}" for text in documents]):
        stream = encoder.encode(chunk)
        assert (stream == eot).sum() == len(chunk)
    assert tokenizer.to_str() == before
    kept = Encoder(Tokenizer.from_str(before), eot, UINT16).encode(["a b", "b a"])
    tokenizer.encode_special_tokens = True
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in ("a b", "b a")]
    assert kept.tolist() == [eot, *ids[0], eot, *ids[1]]
    if kind in ("not special", "merged"):  # bytes encode everything
        stream = encoder.encode(documents)
        starts = np.flatnonzero(stream == eot)
        texts = [tokenizer.decode(part[1:].tolist()) for part in np.split(stream, starts)[1:]]
        assert texts == documents


def test_a_document_of_many_forged_boundaries() -> None:
    tokenizer, name = forging("word")
    eot = tokenizer.token_to_id(name)
    assert eot is not None
    encoder = Encoder(tokenizer, eot, UINT16)
    stream = encoder.encode([f"{name} a " * 20_000])
    assert (stream == encoder.eot).sum() == 1 and len(stream) > 40_000


def test_text_that_is_nothing_but_the_end_of_text_token() -> None:
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, "</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder = Encoder(tokenizer, 0, UINT16)
    assert encoder.encode(["a a"]).tolist() == [0, 1, 1]
    with pytest.raises(UserError, match="makes its end-of-text token '</s>' of 'é'") as caught:
        encoder.encode(["a é a"])
    assert "\n" not in str(caught.value)


def test_a_given_tokenizer_that_does_not_fit(tmp_path: Path) -> None:
    file = save(plain("</s>"), tmp_path / "a")
    with pytest.raises(UserError, match=r"has 5 tokens, but model.vocab_size = 4"):
        load_tokenizer(file, 4)
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(save(plain("<end>"), tmp_path / "b"), 100)
    with pytest.raises(UserError, match="no such file"):
        find_tokenizer(str(tmp_path / "c"))
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match=r"has no tokenizer.json"):
        find_tokenizer(str(tmp_path / "d"))
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    with pytest.raises(UserError, match=r"not a tokenizer.json"):
        load_tokenizer(broken, 100)


TRANSFORMERS = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts = json.loads(sys.argv[2])
ids = [tokenizer(text)["input_ids"] for text in texts]
print(json.dumps({
    "ids": ids,
    "texts": tokenizer.batch_decode(ids, skip_special_tokens=True),
    "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
    "max": tokenizer.model_max_length,
    "chats": [
        tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=end)
        for end in (False, True)
    ],
    "chat_ids": tokenizer.apply_chat_template(CHAT, return_dict=False),
}))
"""
CHAT = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "naïve {{ 3 }}?"},
]


def test_transformers_reads_the_export(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tokenizer = train()
    file = save(tokenizer, tmp_path / "cache")
    ids = export_tokenizer(file, tmp_path / "export", 512)
    pad = tokenizer.token_to_id("ÿ")  # the byte 0xFF, which no text contains
    assert ids == {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": pad}
    samples = [*texts(5, seed=3), "", " a , b .", "don 't", "naïve 数\U0001f600", f"a{EOT}b"]
    code = f"CHAT = {CHAT}" + TRANSFORMERS
    result = run("-P", "-c", code, tmp_path / "export", json.dumps(samples), cwd=tmp_path)
    got = json.loads(result.stdout.splitlines()[-1])
    assert got["ids"] == [tokenizer.encode(text).ids for text in samples]
    assert got["texts"] == [text.replace(EOT, "") for text in samples]
    assert got["special"] == [0, 0, pad]
    assert got["max"] == 512
    chat = f"{EOT}Be brief.\n\nUser: 2 + 2?\n\nAssistant: 4{EOT}User: naïve {{{{ 3 }}}}?\n\n"
    assert got["chats"] == [chat, f"{chat}Assistant:"]
    assert got["chat_ids"] == tokenizer.encode(chat, add_special_tokens=False).ids
    assert got["chat_ids"].count(0) == 2
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert names == {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    }


def exported_settings(given: Path, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer_config.json after two copies, as from a folder to run to export, and the ids."""
    export_tokenizer(given, out / "run", 512)
    ids = export_tokenizer(out / "run" / "tokenizer.json", out / "export", 512)
    return json.loads((out / "export" / "tokenizer_config.json").read_text()), ids


def test_a_given_tokenizer_keeps_its_chat_template_and_padding(tmp_path: Path) -> None:
    file = save(plain("</s>", "<pad>"), tmp_path / "a")
    beside = tmp_path / "a" / "tokenizer_config.json"
    given = {"eos_token": "</s>", "pad_token": {"content": "<pad>"}, "chat_template": "in config"}
    beside.write_text(json.dumps(given))
    settings, ids = exported_settings(file, tmp_path / "1")
    assert (settings["chat_template"], settings["pad_token"]) == ("in config", "<pad>")
    assert ids == {"bos_token_id": None, "eos_token_id": 4, "pad_token_id": 5}
    assert "bos_token" not in settings, "its template may start with one: it would become text"
    assert (tmp_path / "1" / "export" / "chat_template.jinja").read_text() == "in config"

    (tmp_path / "a" / "chat_template.jinja").write_text("in file")  # preferred in transformers too
    settings, _ = exported_settings(file, tmp_path / "2")
    assert settings["chat_template"] == "in file"

    more = tmp_path / "a" / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("tools")
    settings, _ = exported_settings(file, tmp_path / "3")
    assert settings["chat_template"] == [
        {"name": "default", "template": "in file"},
        {"name": "tool_use", "template": "tools"},
    ]
    assert not (tmp_path / "3" / "export" / "chat_template.jinja").exists()
    assert {path.name for path in files_beside(file)} == {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tool_use.jinja",
    }  # fmt: skip


@pytest.mark.parametrize("template", [3, {"default": "x"}, ["x"], [{"name": "default"}]])
def test_a_chat_template_that_is_none(template: object, tmp_path: Path) -> None:
    file = save(plain("</s>"), tmp_path / "a", "</s>")
    beside = tmp_path / "a" / "tokenizer_config.json"
    beside.write_text(json.dumps({"chat_template": template}))
    with pytest.raises(UserError, match=r"tokenizer_config.json: chat_template must be"):
        export_tokenizer(file, tmp_path / "out", 512)
    beside.write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json: not valid JSON"):
        load_tokenizer(file, 100)
