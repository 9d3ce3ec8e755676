"""Reading documents: every kind of source, and every mistake a user can make with it."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from configs.rules import ConfigError
from configs.schema import Data
from train import sources
from train.sources import cut, locate


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def read(source: Path | str, **settings: Any) -> list[str]:
    return list(locate(Data(source=str(source), **settings)).read())


def fails(source: Path | str, *parts: str, **settings: Any) -> None:
    with pytest.raises(ConfigError) as caught:
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
    source = locate(Data())
    documents = source.read()
    assert list(documents) == ["a = 1\n", "b\r\n"]
    assert [Path(file).name for file in documents.not_utf8] == ["latin.py"]
    write(root, {"a.py": "a = 12\n"})
    assert locate(Data()).identity != source.identity


def test_the_real_stdlib_is_found() -> None:
    assert len(locate(Data()).identity[2]) > 100


def test_a_folder_takes_what_it_knows(tmp_path: Path) -> None:
    write(tmp_path, {"b.md": "# b", "sub/a.txt": "first\n<|endoftext|>\nsecond\n<|endoftext|>\n"})
    write(tmp_path, {"x.pdf": b"%PDF", ".git/c.txt": "c", "bom.txt": b"\xef\xbb\xbfbom"})
    write(tmp_path, {"rows.jsonl": '{"text": "row"}\n{"text": null}\n', "bad.txt": b"\xff"})
    source = locate(Data(source=str(tmp_path), cache_dir=str(tmp_path / "cache")))
    documents = source.read()
    assert list(documents) == ["# b", "bom", "first\n", "second\n", "row", ""]
    assert documents.not_utf8 == [str(tmp_path / "bad.txt")]
    assert documents.take([4, 0, 5, 3, 4]) == ["row", "# b", "", "second\n", "row"]


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
    fails(path, "holds int64, not text", text_field="n", cache_dir=cache)


def test_a_broken_table_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": oops\n')
    fails(path, "cannot be read as json", cache_dir=str(tmp_path / "cache"))


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
    fails(tmp_path / "paper.pdf", ".pdf is not supported", ".jsonl")
    fails(tmp_path / "rows.json", "name it .jsonl")
    fails(tmp_path / "pictures", "no document", ".png")
    monkeypatch.chdir(tmp_path)
    fails("corpsu.txt", "did you mean corpus.txt?")
    fails("./corpus", "no such file or folder")


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
    assert locate(Data(source="org/name:subset")).label == "org-name-subset"

    def unreachable(*names: str, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach 'name' on the Hub\nwith details")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    fails("org/name", "no such file or folder", "Hugging Face", "Couldn't reach 'name' on the Hub")
