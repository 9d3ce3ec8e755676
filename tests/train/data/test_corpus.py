"""The corpus on disk: the stream decodes to the documents, and the cache is robust."""

import hashlib
import json
import os
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from configs.errors import UserError
from tests.runs import started
from tests.train.data.corpora import config, silent, write_texts
from train.data import corpus as subject
from train.data.corpus import Corpus, DamagedCache, open_corpus, prepare
from train.data.dedup import split
from train.tokenizer.tokenizer import WORDS, train_tokenizer


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    return write_texts(tmp_path)


def documents(corpus: Corpus, tokens: np.ndarray) -> list[str]:
    """The texts of a stream, decoded by the library."""
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    assert tokens[0] == corpus.eot
    parts = np.split(tokens, np.flatnonzero(tokens == corpus.eot))[1:]
    return [tokenizer.decode(part[1:].tolist(), skip_special_tokens=False) for part in parts]


def test_stream_decodes_to_the_documents(tmp_path: Path, texts: list[str]) -> None:
    lines: list[str] = []
    corpus = prepare(config(tmp_path, validation_fraction=0.2), lines.append)
    train, held_out = documents(corpus, corpus.train), documents(corpus, corpus.validation)
    assert sorted(train + held_out) == sorted(texts)
    assert len(train) > len(held_out) > 1
    by_hash = sorted(texts, key=lambda t: hashlib.blake2b(t.encode(), digest_size=16).digest())
    assert train == [text for text in by_hash if text in train]
    assert corpus.train_bytes == sum(len(text.encode()) for text in train)
    assert corpus.validation_bytes == sum(len(text.encode()) for text in held_out)
    assert corpus.train.dtype == np.uint16 and isinstance(corpus.train, np.memmap)
    assert any("40 documents" in line for line in lines)
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    assert manifest["documents"]["train"] == len(train)
    assert manifest["tokens"]["validation"] == len(corpus.validation)


def test_tokenizer_learns_from_the_training_documents_only(
    tmp_path: Path, texts: list[str]
) -> None:
    corpus = prepare(config(tmp_path, validation_fraction=0.4), silent)
    train = documents(corpus, corpus.train)
    expected = train_tokenizer(lambda: train, 300, silent)
    assert Tokenizer.from_file(str(corpus.tokenizer_file)).to_str() == expected.to_str()
    assert expected.to_str() != train_tokenizer(lambda: texts, 300, silent).to_str()


def test_split_is_stable_and_never_empty() -> None:
    digests = [hashlib.blake2b(bytes([i]), digest_size=16).digest() for i in range(250)]
    for fraction in (0.0, 0.02, 0.3, 0.5):
        held_out = split(digests, fraction)
        assert abs(held_out.mean() - fraction) < 4 * (0.25 / 250) ** 0.5 + 1 / 250
        assert 0 < held_out.sum() < 250
    some = np.arange(0, 250, 2)
    assert np.array_equal(split([digests[i] for i in some], 0.3), split(digests, 0.3)[some])
    for pair in range(0, 100, 2):
        assert split(digests[pair : pair + 2], 0.5).sum() == 1


def test_second_call_reads_the_cache(tmp_path: Path, texts: list[str]) -> None:
    first = prepare(config(tmp_path), silent)
    lines: list[str] = []
    start = time.perf_counter()
    second = prepare(config(tmp_path), lines.append)
    assert time.perf_counter() - start < 0.3
    assert "(cached)" in lines[0] and len(lines) == 1
    assert second.folder == first.folder and second.fingerprint == first.fingerprint
    assert np.array_equal(open_corpus(first.folder).train, first.train)
    # Another cache folder: everything is built again, with identical bytes.
    third = prepare(config(tmp_path, cache_dir=str(tmp_path / "other")), silent)
    assert third.folder.name == first.folder.name and third.fingerprint == first.fingerprint


def test_what_changes_the_corpus_changes_its_folder(tmp_path: Path, texts: list[str]) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"vocab_size": 301},
        {"validation_fraction": 0.3},
        {"near_duplicate_threshold": 1.0},
    ]
    folders = [prepare(config(tmp_path, **change), silent).folder for change in changes]
    same = prepare(config(tmp_path, seq_len=99), silent).folder
    given = prepare(config(tmp_path, tokenizer=str(folders[0])), silent)
    assert np.array_equal(given.train, open_corpus(folders[0]).train)
    (tmp_path / "docs" / "0.py").write_text("changed = True\n")
    folders += [given.folder, prepare(config(tmp_path), silent).folder]
    assert len(set(folders)) == len(folders) and same == folders[0]


def test_a_given_chat_template_is_kept_and_part_of_the_key(
    tmp_path: Path, texts: list[str]
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    trained = train_tokenizer(lambda: texts, 300, silent)
    trained.save(str(given / "tokenizer.json"))
    folders = []
    for template in ("first", "second"):
        (given / "chat_template.jinja").write_text(template)
        folders.append(prepare(config(tmp_path, tokenizer=str(given)), silent).folder)
        settings = json.loads((folders[-1] / "tokenizer_config.json").read_text())
        assert settings == {"eos_token": "<|endoftext|>", "chat_template": template}
    assert folders[0] != folders[1]


def test_another_rule_for_words_is_another_corpus(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prepare(config(tmp_path), silent).folder
    given = prepare(config(tmp_path, tokenizer=str(before)), silent).folder
    monkeypatch.setattr(subject, "WORDS", r"\S+|\s+")
    assert prepare(config(tmp_path), silent).folder != before
    assert prepare(config(tmp_path, tokenizer=str(before)), silent).folder == given


def test_wide_tokens(tmp_path: Path, texts: list[str]) -> None:
    narrow = prepare(config(tmp_path), silent)
    wide = prepare(config(tmp_path, 2**16 + 1, tokenizer=str(narrow.folder)), silent)
    assert wide.train.dtype == np.uint32
    assert np.array_equal(wide.train, narrow.train)


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest", "format", "shape"])
def test_a_damaged_cache_is_built_again(tmp_path: Path, texts: list[str], damage: str) -> None:
    good = prepare(config(tmp_path), silent)
    tokens, folder = np.array(good.train), good.folder
    file, manifest = folder / "train.npy", folder / "manifest.json"
    if damage == "truncate":
        os.truncate(file, 100)
    elif damage == "flip":
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
    elif damage == "delete":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text('{"format": 2')
    elif damage == "format":
        manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 0'))
    else:
        manifest.write_text("[]")
    with pytest.raises(DamagedCache):
        open_corpus(folder)
    lines: list[str] = []
    again = prepare(config(tmp_path), lines.append)
    assert "building it again" in lines[0]
    assert np.array_equal(again.train, tokens) and again.fingerprint == good.fingerprint
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_build_that_fails_leaves_nothing(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*rest: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(subject, "_publish", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(config(tmp_path), silent)
    assert list((tmp_path / "cache").iterdir()) == []
    for name, age in ((".building-old", 2), (".building-new", 0)):  # as a killed process leaves it
        (tmp_path / "cache" / name).mkdir()
        os.utime(tmp_path / "cache" / name, times=(time.time() - age * 86400,) * 2)
    prepare(config(tmp_path), silent)
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    assert ".building-new" in names and ".building-old" not in names and len(names) == 2


CHILD = """
import json
import sys
import time
from pathlib import Path
from configs.loader import from_dict
from train.data.corpus import prepare
config = from_dict(json.loads(sys.argv[1]), "test")
print("ready", flush=True)
while not Path(sys.argv[2]).exists():
    time.sleep(0.001)
print(prepare(config, lambda line: None).fingerprint)
"""


def test_two_processes_at_once(tmp_path: Path, texts: list[str]) -> None:
    tree, begin = json.dumps(asdict(config(tmp_path))), tmp_path / "begin"
    with (
        started("-c", CHILD, tree, begin) as first,
        started("-c", CHILD, tree, begin) as second,
    ):
        deadline = time.monotonic() + 60
        while not all(one.printed()[0] for one in (first, second)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        begin.touch()
        ends = [one.finish(60) for one in (first, second)]
    assert [end.returncode for end in ends] == [0, 0]
    assert len({end.stdout for end in ends}) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_later_builder_uses_the_earlier_folder(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subject.build

    def build_while_another_finishes(*rest: Any) -> dict[str, Any]:
        monkeypatch.setattr(subject, "build", real)
        first.append(prepare(config(tmp_path), silent))
        inode.append(first[0].tokenizer_file.stat().st_ino)
        return real(*rest)

    first: list[Corpus] = []
    inode: list[int] = []
    monkeypatch.setattr(subject, "build", build_while_another_finishes)
    second = prepare(config(tmp_path), silent)
    assert second.tokenizer_file.stat().st_ino == inode[0]


def test_an_older_corpus_is_found(tmp_path: Path, texts: list[str]) -> None:
    """The key of text files has not changed since format 2."""
    files = [tmp_path / "docs" / f"{number}.py" for number in range(40)]
    stamps = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(files)]
    parts = [2, ["files", stamps], "text", 0.02, 0.8, WORDS, 300, version("tokenizers")]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    assert prepare(config(tmp_path), silent).folder.name == f"docs-{key}"


def test_mistakes_are_one_line(tmp_path: Path, texts: list[str]) -> None:
    def message(**change: Any) -> str:
        with pytest.raises(UserError) as caught:
            prepare(config(tmp_path, **change), silent)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "model.vocab_size = 100: a byte-level" in message(vocab_size=100)
    assert "model.vocab_size = 60000" in message(vocab_size=60000)
    (tmp_path / "twice").mkdir()
    for name in "ab":
        (tmp_path / "twice" / f"{name}.txt").write_text("the same text")
    assert "1 of 2 documents left" in message(source=str(tmp_path / "twice"))
    (tmp_path / "empty.txt").touch()
    assert "no text in it" in message(source=str(tmp_path / "empty.txt"))
    assert "data.cache_dir" in message(cache_dir=str(tmp_path / "docs" / "0.py"))
    assert "data.cache_dir" in message(cache_dir=str(tmp_path / "a\0b"))
    assert "data.cache_dir" in message(cache_dir=str(tmp_path / ("a" * 5000)))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert "data.cache_dir" in message(cache_dir=str(tmp_path / "dangling"))
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(FileNotFoundError, match="every host"):
        open_corpus(tmp_path / "nowhere")
