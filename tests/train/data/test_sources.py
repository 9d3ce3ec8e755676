"""Reading documents: every kind of source, and every user error."""

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.schema import DataConfig
from train.data import progress, sources
from train.data.sources import cut, locate


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def read(source: Path | str, **settings: Any) -> list[str]:
    return list(locate(DataConfig(source=str(source), **settings)).read())


def fails(source: Path | str, *parts: str, **settings: Any) -> None:
    with pytest.raises(UserError) as caught:
        read(source, **settings)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("data.source", *parts):
        assert part in message, message


def test_stdlib_is_all_its_python_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: dict[str, str | bytes] = {"a.py": "a = 1\n", "test/b.py": "b\r\n", "notes.txt": "no"}
    skipped = {"site-packages/c.py": "c", "dist-packages/d.py": "d", "x/__pycache__/e.py": "e"}
    root = write(tmp_path, files | skipped | {"latin.py": b"# caf\xe9"})
    monkeypatch.setattr(sources, "stdlib_root", lambda: root)
    source = locate(DataConfig())
    documents = source.read()
    assert list(documents) == ["a = 1\n", "b\r\n"]
    assert [Path(file).name for file in documents.not_utf8] == ["latin.py"]
    write(root, {"a.py": "a = 12\n"})
    assert locate(DataConfig()).identity != source.identity


def test_the_real_stdlib_is_found() -> None:
    assert len(locate(DataConfig()).identity[2]) > 100


def test_a_folder_takes_what_it_knows(tmp_path: Path) -> None:
    write(tmp_path, {"b.md": "# b", "sub/a.txt": "first\n<|endoftext|>\nsecond\n<|endoftext|>\n"})
    write(tmp_path, {"x.pdf": b"%PDF", ".git/c.txt": "c", "bom.txt": b"\xef\xbb\xbfbom"})
    write(tmp_path, {"rows.jsonl": '{"text": "row"}\n{"text": null}\n', "bad.txt": b"\xff"})
    write(tmp_path, {"utf16.txt": "valid UTF-8, and no text".encode("utf-16-le")})
    source = locate(DataConfig(source=str(tmp_path), cache_dir=str(tmp_path / "cache")))
    documents = source.read()
    assert list(documents) == ["# b", "bom", "first\n", "second\n", "row", ""]
    assert documents.not_utf8 == [str(tmp_path / name) for name in ("bad.txt", "utf16.txt")]
    assert documents.take([4, 0, 5, 3, 4]) == ["row", "# b", "", "second\n", "row"]
    told = "passed over 1 files of other kinds (1 .pdf), 1 hidden files and folders"
    assert documents.notes == [told]
    names = ["a.jsonl.xz", "b.ZST", "Makefile", "c.csv", "d.json", "e.bin", "sub/f.csv"]
    write(tmp_path, dict.fromkeys(names, b"x"))
    (note,) = locate(DataConfig(source=str(tmp_path))).read().notes
    assert note.startswith("passed over 8 files of other kinds (2 .csv, ") and ", ...)" in note


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_tables(tmp_path: Path, suffix: str) -> None:
    texts = [f"document {i} é\n" for i in range(600)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        import datasets

        datasets.Dataset.from_dict({"n": range(600), "body": texts}).to_parquet(path)
    else:
        opener = gzip.open if suffix.endswith("gz") else open
        with opener(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"n": 1, "body": text}) + "\n" for text in texts)
    cache = str(tmp_path / "cache")
    assert read(path, text_field="body", cache_dir=cache) == texts
    fails(path, "no such column", "n, body", "did you mean body", text_field="bod", cache_dir=cache)
    kind = "int64" if suffix == "parquet" else "a number"
    fails(path, f"holds {kind}, not text", text_field="n", cache_dir=cache)


def test_a_broken_table_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": oops\n')
    fails(path, "line 2: not JSON", cache_dir=str(tmp_path / "cache"))


def test_one_text_is_cut_into_documents() -> None:
    rng = random.Random(0)
    for ends in (("\n", "\n\n", "\r\n \t\r\n"), ("\n",)):
        for length in (40, 400, 20_000):
            text = "".join(
                "w" * rng.randrange(1, 40) + rng.choice(ends) for _ in range(length // 20)
            )
            pieces = cut(text)
            assert "".join(pieces) == text
            assert len(pieces) > 1
            size = min(sources.PIECE_LENGTH, len(text) // 16)
            assert all(len(piece) >= size for piece in pieces[:-1])
            blank = "\n\n" in text or "\r\n \t\r\n" in text
            assert all(piece.endswith("\n\n" if blank else "\n") or blank for piece in pieces[:-1])
    assert cut("one line") == ["one line"]


def test_separators_win_over_cutting(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "one\n\ntwo\n<|endoftext|>\nthree <|endoftext|> inside\n"})
    assert read(tmp_path / "a.txt") == ["one\n\ntwo\n", "three <|endoftext|> inside\n"]
    write(tmp_path, {"notes": "first\n\nsecond\n\nthird"})
    assert len(read(tmp_path / "notes")) == 3


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"corpus.txt": "x", "latin.txt": b"caf\xe9", "paper.pdf": b"%PDF"})
    write(tmp_path, {"rows.json": "[]", "pictures/cat.png": b"x"})
    fails(tmp_path / "corpsu.txt", "no such file or folder", str(tmp_path / "corpus.txt"))
    fails(tmp_path / "no" / "where.txt", "no such file or folder")
    fails(tmp_path / "latin.txt", "not UTF-8", "byte 3")
    for encoding, nul in {"utf-16-le": 1, "utf-16-be": 0, "utf-32-le": 1, "utf-16": 3}.items():
        write(tmp_path, {"wide.txt": ("words " * 2000).encode(encoding)})
        fails(tmp_path / "wide.txt", "not UTF-8", f"byte {nul}")
    fails(tmp_path / "paper.pdf", ".pdf is not supported", ".jsonl")
    fails(tmp_path / "rows.json", "name it .jsonl")
    fails(tmp_path / "pictures", "no document", ".png")
    monkeypatch.chdir(tmp_path)
    fails("corpsu.txt", "did you mean corpus.txt?")
    fails("./corpus", "no such file or folder")


NAMES = [
    "*.{s}", "[ab].{s}", "a?.{s}", "a::b.{s}", "~nobody.{s}", "~root", "{{a,b}}.{s}", "%41.{s}",
    "**", "hf:x.{s}", "$HOME.{s}", "a\\b.{s}", " a.{s}", "zip::a.{s}", "two\nlines.{s}", "#a.{s}",
]  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet", "txt"])
def test_a_name_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.chdir(tmp_path)
    table(tmp_path / f"a.{suffix}", "decoy")
    table(tmp_path / f"ab.{suffix}", "decoy")
    for number, pattern in enumerate(NAMES):
        name = pattern.format(s=suffix)
        if "." in name:
            folder, path = tmp_path / str(number), Path(name)
            table(path, "this one")
            assert read(name) == ["this one"], name
            assert read(tmp_path / name) == ["this one"], name
            path.unlink()
        else:
            folder = Path(name)
        table(folder / f"x.{suffix}", "in the folder")  # also if a folder has that name
        assert read(folder) == ["in the folder"], name
    table(tmp_path / "http:" / "host" / f"a.{suffix}", "no address")
    assert read(f"http://host/a.{suffix}") == ["no address"]
    missing = ["*.X", "a.X\0", "\0", "~nobody/x.X", "a" * 5000, "a.X::b", "[a].X"]
    for name in (*missing, f"file://{tmp_path}/a.X"):
        fails(name.replace("X", suffix))


def table(path: Path, text: str) -> None:
    """A file of one document, in the format of its suffix."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".parquet"):
        with open(path, "wb") as file:
            pq.write_table(pa.table({"text": [text]}), file)
    else:
        raw = text.encode() if path.suffix == ".txt" else json.dumps({"text": text}).encode()
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def test_a_hub_name_never_means_a_folder_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"a.json": '{"text": "a"}', "rows/a.jsonl": '{"text": "a"}'})
    for name in ("json", "text", "parquet", "rows:default"):
        fails(name, "no dataset of the Hub")


def test_neither_file_nor_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    fails(tmp_path / "pipe.jsonl", "neither a file nor a folder")
    write(tmp_path, {"a.txt": "a"})
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    assert read(tmp_path) == ["a"]
    fails(tmp_path / "loop.txt", f"a link to {tmp_path / 'loop.txt'}: no such file or folder")
    fails(tmp_path / "gone.jsonl", f"a link to {tmp_path / 'nowhere'}: no such file or folder")


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a.txt": "a", "secret/b.txt": "b"})
    real = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    fails(tmp_path, f"{tmp_path / 'secret'}: Permission denied")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    for name in (b"caf\xe9.txt", b"caf\xe9.jsonl", b"line\nend.txt"):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(b'{"text": "caf\xe9"}')
    with open(os.path.join(folder, b"good\xe9.jsonl"), "wb") as file:
        file.write(b'{"text": "good"}')
    write(tmp_path, {"a.txt": "a"})
    documents = locate(DataConfig(source=str(tmp_path))).read()
    assert list(documents) == ["a", "good"]
    left_out = ["caf\\xe9.jsonl", "caf\\xe9.txt", "line\\nend.txt"]
    assert sorted(documents.not_utf8) == [f"{tmp_path}/{name}" for name in left_out]
    assert read(tmp_path / os.fsdecode(b"good\xe9.jsonl")) == ["good"]
    fails(tmp_path / os.fsdecode(b"caf\xe9.txt"), "not UTF-8", "caf\\udce9")
    fails(tmp_path / os.fsdecode(b"god\xe9.jsonl"), "did you mean", "good\\xe9.jsonl")


def test_progress_of_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", -1.0)
    write(tmp_path, {"a.jsonl": '{"text": "a"}\n' * 3})
    lines: list[str] = []
    locate(DataConfig(source=str(tmp_path))).read(tmp_path, lines.append)
    assert lines == [f"corpus: {n} rows of {tmp_path}/a.jsonl so far" for n in range(3)]
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "/full/blob"),
        OSError(30, "Read-only file system"),
        OSError("Not enough disk space. Needed: 3 GB"),
        RuntimeError("Data processing error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_under_a_download(
    monkeypatch: pytest.MonkeyPatch, error: Exception, wrapped: bool
) -> None:
    import datasets

    def load_dataset(*names: str, **options: Any) -> Any:
        if wrapped:
            raise ValueError("An error occurred while generating the dataset") from error
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    named = getattr(error, "filename", None) or str(datasets.config.HF_CACHE_HOME)
    fails("org/name", f"{named}: the download cannot be written", "HF_HOME")


def test_hugging_face_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(*names: str, **options: Any) -> Any:
        asked.append((names, options))
        return datasets.Dataset.from_dict({"text": ["a", "b", None]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("org/name:subset") == ["a", "b", ""]
    assert read("name") == ["a", "b", ""]
    assert asked == [(("org/name", "subset"), {"split": "train"}), (("name",), {"split": "train"})]
    assert locate(DataConfig(source="org/name:subset")).label == "org-name-subset"

    def unreachable(*names: str, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach 'name' on the Hub\nwith details")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    fails("org/name", "no such file or folder", "Hugging Face", "Couldn't reach 'name' on the Hub")
