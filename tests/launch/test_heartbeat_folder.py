"""Folders of heartbeats: those of killed supervisors are removed, those in use never."""

import fcntl
import os
import signal
import tempfile
from pathlib import Path

import pytest

from launch.supervisor.heartbeat_folder import heartbeat_folder, remove_left_folders


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def killed_supervisor() -> None:
    """A process that makes a folder and is killed while it uses it."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with heartbeat_folder() as folder:
            (folder / "rank-00000").write_bytes(b"x")
            os.write(writing, b"1")
            signal.pause()
        os._exit(1)
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_folders_of_killed_supervisors_are_removed_and_no_others(place: Path) -> None:
    kept = place / "phalanx-rank-heartbeats-file"
    kept.write_text("no folder")
    target = place / "target"
    target.mkdir()
    link = place / "phalanx-rank-heartbeats-link"
    link.symlink_to(target)
    with heartbeat_folder() as used:
        killed_supervisor()
        assert len(list(place.glob("phalanx-rank-heartbeats-*"))) == 4
        with heartbeat_folder() as other:
            assert {*place.iterdir()} == {kept, link, target, used, other}
        assert {*place.iterdir()} == {kept, link, target, used}
    assert {*place.iterdir()} == {kept, link, target}


def test_a_folder_that_is_removed_before_it_is_locked_is_made_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, calls = fcntl.flock, list[int]()

    def removed_first(handle: int, operation: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            remove_left_folders()
            assert not list(place.iterdir())
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with heartbeat_folder() as folder:
        assert [*place.iterdir()] == [folder]
    assert not list(place.iterdir())


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_folders_of_other_users_are_kept(place: Path) -> None:
    theirs = place / "phalanx-rank-heartbeats-x"
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    remove_left_folders()
    assert theirs.is_dir()


def test_a_file_system_without_locks_keeps_everything(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(handle: int, operation: int) -> None:
        raise OSError("no locks available")

    killed_supervisor()
    monkeypatch.setattr(fcntl, "flock", refused)
    with heartbeat_folder() as folder:
        assert folder.is_dir() and len(list(place.iterdir())) == 2
    assert len(list(place.iterdir())) == 1
