"""Files are complete or absent: an error names the file, and the old content stays."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.paths import local_path
from train.atomic_files import claim, naming, replace_text, sync, write_fault


def test_replace_text_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    replace_text(path, "old")

    def refuse(*rest: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for target in ("pathlib.Path.write_bytes", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(target, refuse)
            with pytest.raises(OSError, match="No space left") as caught:
                replace_text(path, "new")
        assert str(caught.value.filename).startswith(str(tmp_path)) and caught.value.errno == 28
        assert path.read_text() == "old"
    replace_text(path, "new é")
    assert path.read_text("utf-8") == "new é"
    with pytest.raises(UserError, match=r"a.json: cannot hold .*udce9.*: it is not UTF-8"):
        replace_text(path, "source = caf\udce9")


def test_sync_names_what_it_cannot_open(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        sync(tmp_path / "nothing")
    assert str(caught.value.filename) == str(tmp_path / "nothing")


def test_naming_keeps_a_name_that_is_there() -> None:
    with pytest.raises(OSError, match="x") as caught, naming(Path("folder")):
        raise OSError(errno.EIO, "x", "file")
    assert caught.value.filename == "file"
    with pytest.raises(OSError, match="strange") as caught, naming(Path("folder")):
        raise OSError("strange")
    assert caught.value.filename == "folder"
    with pytest.raises(OSError) as caught, naming(Path("folder")):  # as shutil.copyfile does
        raise OSError(errno.ENOSPC, "No space left on device", "source", None, "target")
    assert caught.value.filename == "target"
    with pytest.raises(OSError) as caught, naming(Path("folder")):
        raise OSError(errno.EIO, "Input/output error", "source", None, "target")
    assert caught.value.filename == "source"


def test_a_claim_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*rest: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UserError, match=r"run/.lock: cannot be locked: No locks available"):
        claim(tmp_path / "run")
    assert len(os.listdir("/proc/self/fd")) == before


def test_write_fault_looks_through_causes() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    outer = ValueError("outer")
    outer.__cause__ = RuntimeError("inner")
    assert write_fault(outer) is None
    outer.__cause__.__context__ = full
    assert write_fault(outer) is full and write_fault(full) is full
    assert write_fault(OSError(errno.ENOENT, "No such file")) is None


def test_only_the_own_home_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/away/me")
    assert local_path("~") == Path("/away/me") and local_path("~/a*") == Path("/away/me/a*")
    for text in ("~root", "~nobody/x", "a/~", "$HOME", "a::b", "./~"):
        assert local_path(text) == Path(text)
