"""Content that a corpus cannot read or write: counted and listed, or a one-line error with the
place."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from configs.errors import UserError
from parallel.ranks import Ranks
from tests.runs import TINY, largest_file
from tests.train.data.corpora import config, silent, write_texts
from train import __main__ as command
from train.data.corpus import prepare


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    return write_texts(tmp_path)


def test_names_that_are_not_utf8_are_listed(tmp_path: Path, texts: list[str]) -> None:
    name = os.path.join(os.fsencode(tmp_path / "docs"), b"caf\xe9\n.txt")
    with open(name, "wb") as file:
        file.write(b"caf\xe9")
    with open(tmp_path / "docs" / "rows.jsonl", "wb") as file:
        file.write(b'{"text": "good"}\n{"text": "caf\xe9"}\n')
    good = str(tmp_path / "docs" / "rows.jsonl")
    for cache in ("cache", os.fsdecode(b"cach\xe9")):
        for _ in range(2):  # built, then found
            lines: list[str] = []
            corpus = prepare(config(tmp_path, cache_dir=str(tmp_path / cache)), lines.append)
            assert all(line.isprintable() and line.encode() for line in lines), lines
        manifest = json.loads((corpus.folder / "manifest.json").read_text("ascii"))
        assert sorted(manifest["files_not_utf8"]) == [f"{tmp_path}/docs/caf\\xe9\\n.txt", good]
        assert manifest["documents"]["read"] == 40


def test_rows_left_out_are_counted_and_part_of_the_key(tmp_path: Path, texts: list[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join([json.dumps({"text": text}) for text in texts] + ['{"text": "cut']))
    with pytest.raises(UserError, match="line 41: not JSON"):
        prepare(config(tmp_path, source=str(rows)), silent)
    lines: list[str] = []
    settings: dict[str, Any] = {"source": str(rows), "unreadable_rows": "skip"}
    corpus = prepare(config(tmp_path, **settings), lines.append)
    assert f"corpus: left out 1 rows that cannot be read, as {rows}, line 41: not JSON" in str(
        lines
    )
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    assert manifest["rows_unreadable"]["count"] == len(manifest["rows_unreadable"]["first"]) == 1
    with pytest.raises(UserError, match="line 41: not JSON"):  # the cached one is not used
        prepare(config(tmp_path, source=str(rows)), silent)
    same = prepare(config(tmp_path), silent)  # the folder of the same texts
    assert same.fingerprint == corpus.fingerprint


@pytest.mark.parametrize("given", [False, True])
def test_a_disk_that_takes_no_more(tmp_path: Path, texts: list[str], given: bool) -> None:
    whole = prepare(config(tmp_path, cache_dir=str(tmp_path / "other")), silent)
    sizes = {path.stat().st_size for path in whole.folder.iterdir()}
    spool = sum(len(text.encode()) for text in texts)
    tokenizer: dict[str, Any] = {"tokenizer": str(whole.folder)} if given else {}
    for size in sorted({0, spool - 1, *(size - 1 for size in sizes)}):
        with largest_file(size), pytest.raises(UserError) as caught:
            prepare(config(tmp_path, **tokenizer), silent)
        message = str(caught.value)
        assert f"data.cache_dir = '{tmp_path}/cache': cannot be used" in message, message
        assert "File too large" in message and "None" not in message and "\n" not in message
        assert list((tmp_path / "cache").iterdir()) == []


SITES = [
    "train.data.corpus.sync", "train.data.documents.tempfile.TemporaryFile",
    "pathlib.Path.write_text",
    "pathlib.Path.mkdir", "pathlib.Path.rename", "train.data.corpus_build._write_header",
]  # fmt: skip


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_every_place_that_writes_names_the_folder(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, site: str, code: int
) -> None:
    def refuse(*rest: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(site, refuse)
    with pytest.raises(UserError) as caught:
        prepare(config(tmp_path), silent)
    assert str(caught.value) == (
        f"data.cache_dir = '{tmp_path}/cache': cannot be used: {os.strerror(code)}"
    )


def test_a_tokenizer_that_cannot_be_read_is_not_blamed_on_the_cache(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = prepare(config(tmp_path), silent).tokenizer_file
    real = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path == given:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    settings: dict[str, Any] = {"tokenizer": str(given), "cache_dir": str(tmp_path / "other")}
    with pytest.raises(OSError, match="Permission denied") as caught:
        prepare(config(tmp_path, **settings), silent)
    assert caught.value.filename == str(given)


def test_a_run_folder_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Trainer:
        def __init__(self, *rest: Any) -> None:
            pass

        def run(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")  # as from an open file

    monkeypatch.setattr("train.trainer.Trainer", Trainer)
    one = Ranks(0, 1, torch.device("cpu"), dist.HashStore())
    monkeypatch.setattr("parallel.ranks.start_ranks", lambda threads: one)
    assert command.main([str(TINY), f"--run.dir={tmp_path}/run"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/run: No space left on device\n"
