"""The folder of a dataset, and that of a preparation which is not finished."""

import shutil
from pathlib import Path

import pytest

from configs.errors import UserError
from tests.train.prepare.test_prepare import prepare, texts_of, write
from train.dataset.prepared import verify
from train.prepare import pipeline, statistics


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "draw_lengths", lambda *arguments: None)


def test_a_folder_of_the_user_is_left_alone(tmp_path: Path) -> None:
    """It has the name that an unfinished preparation would have."""
    source = write(tmp_path, "jsonl", texts_of(30))
    notes = tmp_path / "out.preparing" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    with pytest.raises(UserError, match=r"out\.preparing: exists and is no unfinished"):
        prepare(tmp_path, source)
    notes.rename(tmp_path / "notes.txt")
    prepare(tmp_path, source)
    (tmp_path / "out.preparing").mkdir()
    (tmp_path / "notes.txt").rename(notes)
    with pytest.raises(UserError, match=r"out\.preparing: exists and is no unfinished"):
        prepare(tmp_path, source)
    assert notes.read_text() == "mine"


def test_settings_of_the_output_are_not_ignored(tmp_path: Path) -> None:
    source = write(tmp_path, "jsonl", texts_of(300))  # more than one file of 64 KiB
    prepare(tmp_path, source)
    with pytest.raises(UserError, match="prepared already, without --megatron"):
        prepare(tmp_path, source, megatron=True)
    for shard_bytes in (2**17, 2**30):
        with pytest.raises(UserError, match="prepared already, with files of another --shard-mib"):
            prepare(tmp_path, source, shard_bytes=shard_bytes)
    assert any("prepared already" in line for line in prepare(tmp_path, source)["lines"])


def test_a_kill_while_other_work_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder has the work of one command; the next is killed while it removes that; then the
    first is given again."""
    source = write(tmp_path, "jsonl", texts_of(30))
    stop = pytest.raises(OSError, match="stop")
    with monkeypatch.context() as patch, stop:
        patch.setattr(pipeline, "_join", lambda *arguments: (_ for _ in ()).throw(OSError("stop")))
        prepare(tmp_path, source)

    def killed(path: Path) -> None:
        for file in (tmp_path / "out.preparing").glob("*/0.*.bin"):
            file.unlink()
        raise OSError("stop")

    listed = Path.iterdir
    with monkeypatch.context() as patch, pytest.raises(OSError, match="stop"):
        patch.setattr(Path, "iterdir", lambda path: iter(sorted(listed(path))))  # plan.json is late
        patch.setattr(shutil, "rmtree", killed)
        prepare(tmp_path, source, train_vocab=280)
    lines = prepare(tmp_path, source)["lines"]
    assert not any("continuing" in line for line in lines) and verify(tmp_path / "out")


def test_the_lock_of_finished_work_is_removed_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the folder would be taken for the user's, and the same command refused."""
    source, work = write(tmp_path, "jsonl", texts_of(30)), tmp_path / "out.preparing"
    remove = shutil.rmtree

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if path == work:
            raise OSError("stop")
        remove(path, ignore_errors)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="stop"):
        patch.setattr(shutil, "rmtree", killed)
        prepare(tmp_path, source)
    assert (tmp_path / "out").is_dir() and [path.name for path in work.iterdir()] == [".lock"]
    assert any("prepared already" in line for line in prepare(tmp_path, source)["lines"])
    assert not work.exists()
