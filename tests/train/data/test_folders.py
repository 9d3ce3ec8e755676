"""What a folder has besides documents is counted and never read."""

import os
import socket
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.schema import DataConfig
from train.data.folders import list_folder
from train.data.sources import locate
from train.prepare import inputs
from train.prepare.inputs import find_units

NAMES = ["a b.txt", "tab\t.txt", "line\nend.txt", "-rf.txt", "*.txt", "'\"$(x).txt"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six documents with unusual names, in a folder with everything else that a disk may have."""
    root = tmp_path / "root"
    (root / "sub" / ".git").mkdir(parents=True)
    for name in NAMES:
        (root / "sub" / name).write_text(f"the text of {name}\n")
    (root / ".hidden.txt").write_text("hidden")
    (root / "sub" / "up").symlink_to("..")
    (root / "self").symlink_to(root)
    (root / "loop.txt").symlink_to("loop.txt")
    (root / "gone.txt").symlink_to("nowhere.txt")
    (root / "zero.txt").symlink_to("/dev/zero")
    (root / "picture.png").write_bytes(b"png")
    os.mkfifo(root / "pipe.jsonl")
    monkeypatch.chdir(root)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.txt")
    return root


def test_everything_is_counted(folder: Path) -> None:
    listing = list_folder(folder)
    assert [path.name for path in listing.files] == ["picture.png", *sorted(NAMES)]
    told = (
        "2 hidden files and folders, 2 links to folders, 2 links to nothing, "
        "3 pipes, sockets and devices"
    )
    assert listing.described() == told
    units, _, notes = find_units([str(folder)])
    assert sorted(units[0].files) == sorted(str(folder / "sub" / name) for name in NAMES)
    assert notes == [f"{folder}: passed over 1 files of other kinds, {told}"]
    with locate(DataConfig(source=str(folder))).read() as documents:
        assert documents.notes == [f"passed over 1 files of other kinds (1 .png), {told}"]
        assert sorted(documents) == sorted(f"the text of {name}\n" for name in NAMES)


@pytest.mark.parametrize("name", ["pipe.jsonl", "zero.txt", "/dev/stdin", "socket.txt"])
def test_what_is_no_file_is_not_opened(name: str, folder: Path) -> None:
    path = folder / name
    with pytest.raises(UserError, match="neither a file nor a folder"):
        find_units([str(path)])
    with pytest.raises(UserError, match="neither a file nor a folder"):
        locate(DataConfig(source=str(path)))


def test_an_empty_source_is_not_the_current_folder(folder: Path) -> None:
    with pytest.raises(UserError, match="a source is empty"):
        find_units([""])


def test_a_folder_without_documents_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "x.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"no document in this folder \(it has 1 links to nothing"):
        find_units([str(tmp_path)])


def test_many_small_files_are_several_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(25):
        (tmp_path / f"{number:02}.txt").write_text("x")
    monkeypatch.setattr(inputs, "UNIT_FILES", 10)
    units, _, _ = find_units([str(tmp_path)])
    assert [len(unit.files) for unit in units] == [10, 10, 5]
    files = [file for unit in units for file in unit.files]
    assert files == [str(tmp_path / f"{number:02}.txt") for number in range(25)]
