"""A disk that is full, not writable or slow while a checkpoint is written: training continues and
reports it, the space is free again, and the save works as soon as the disk does."""

import os
import re
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import CheckpointConfig
from parallel.ranks import Ranks, start_ranks, stop_ranks
from tests.runs import TINY, started
from train.checkpoint import checkpoint
from train.checkpoint.saver import Saver
from train.checkpoint.storage import client
from train.checkpoint.storage.local import LocalStorage

MIB = 2**20
PROMPT = """
import os, sys
sys.path[0] = {root!r}
from train.checkpoint.storage import process
process._leave_time_to_others = lambda: None
process.Pace.pause = lambda pace: 0.0
{more}
process.main(*sys.argv[1:])
"""
"""The writer process at normal priority, which does not wait for an idle core."""
UNAWARE = "free = os.statvfs('/'); os.statvfs = lambda path: free"
"""The disk is filled by others after the check."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    yield start_ranks(threads=1)
    stop_ranks()


@pytest.fixture(autouse=True)
def prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PROGRAM", PROMPT.format(root=client._ROOT, more=""))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB; only root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@contextmanager
def saver_in(root: Path, ranks: Ranks, **settings: Any) -> Iterator[Saver]:
    one = Saver(LocalStorage(root), CheckpointConfig(**settings), {}, ranks)
    yield one
    one.close()


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {f"w{i}": torch.full((MIB // 40,), float(step)) for i in range(20)}  # 2 MiB


def wait(condition: Callable[[], object]) -> Any:
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def ended(one: Saver) -> bool:
    one.poll()
    return one._active is None


def check(root: Path, steps: list[int]) -> None:
    found = checkpoint.checkpoints(root)
    assert [int(path.name[5:]) for path in found] == steps
    for path in found:
        manifest, live = checkpoint.read_manifest(path), tensors(0)
        checkpoint.verify_files(manifest)
        checkpoint.load(manifest, live)
        assert all(torch.equal(live[name], t) for name, t in tensors(manifest.step).items())


EVERY_TENTH = [
    pytest.param(percent, False, marks=() if percent in (0, 100) else pytest.mark.slow)
    for percent in range(0, 101, 10)
]
"""Per cent of a save that has room; whether the free space is read before it is written."""


@pytest.mark.parametrize(("percent", "aware"), [*EVERY_TENTH, (50, True)])
def test_full_at_every_tenth_of_a_save(
    percent: int, aware: bool, disk: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not aware:
        monkeypatch.setattr(client, "PROGRAM", PROMPT.format(root=client._ROOT, more=UNAWARE))
    root, filler = disk / "checkpoints", disk / "filler"
    with saver_in(root, ranks) as one:
        one.save(tensors(1), {"step": 1})
        wait(lambda: ended(one))
        size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        leave = size * percent // 100
        if percent == 100:  # the tensors have room, and no manifest
            (file,) = root.rglob("*.safetensors")
            leave = -(-file.stat().st_size // 4096) * 4096
        filler.write_bytes(bytes(room - leave))
        left = os.statvfs(disk).f_bavail
        one.lines()
        start = time.monotonic()
        one.save(tensors(2), {"step": 2})
        blocked = time.monotonic() - start
        (told,) = wait(one.lines)
        assert re.search("No space left on device" if not aware else "no space: ", told), told
        assert "step-00000002" in told and "training continues" in told
        assert os.statvfs(disk).f_bavail == left, "nothing of it stays"
        assert blocked < 1.0 and one.saved == 1
        check(root, [1])
        filler.unlink()
        wait(lambda: ended(one))  # repeated
        assert one.saved == 2
        check(root, [1, 2])
        one.save(tensors(3), {"step": 3})
        one.finish()
    check(root, [2, 3])


def test_a_target_that_becomes_read_only(disk: Path, ranks: Ranks) -> None:
    root = disk / "checkpoints"
    remount = ["mount", "-o", "remount,{}", str(disk)]
    with saver_in(root, ranks) as one:
        one.save(tensors(1), {"step": 1})
        wait(lambda: ended(one))
        one.lines()
        subprocess.run([word.format("ro") for word in remount], check=True)
        one.save(tensors(2), {"step": 2})
        (told,) = wait(one.lines)
        assert "Read-only file system" in told and "training continues" in told
        one.save(tensors(3), {"step": 3})  # the next is no better
        assert "not saved" in wait(one.lines)[0]
        subprocess.run([word.format("rw") for word in remount], check=True)
        wait(lambda: ended(one))
        assert one.saved == 3
    check(root, [1, 3])


def test_a_file_size_limit_in_the_middle(tmp_path: Path, ranks: Ranks) -> None:
    """The same for any user, without a mount: the system refuses writes beyond a size."""
    with saver_in(tmp_path, ranks) as one:
        one.save(tensors(1), {"step": 1})
        wait(lambda: ended(one))
        one.lines()
        assert one._writer is not None and one._writer._process is not None
        pid = one._writer._process.pid
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (MIB, resource.RLIM_INFINITY))
        one.save(tensors(2), {"step": 2})
        (told,) = wait(one.lines)
        assert "File too large" in told and "rank-00000" in told and "training continues" in told
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
        wait(lambda: ended(one))
    check(tmp_path, [1, 2])


@pytest.mark.slow
def test_a_run_on_a_full_disk_continues(disk: Path, overrides: list[str], tmp_path: Path) -> None:
    """The disk is full from the second checkpoint on, and free again later."""
    root, filler = disk / "checkpoints", disk / "filler"
    words = ["-m", "train", TINY, *overrides, f"--checkpoint.dir={root}", "--checkpoint.every=5"]
    words += ["--train.steps=100000", "--schedule.steps=100000", "--train.log_every=1"]
    with started(*words, ranks=2) as program:

        def step() -> int:
            return int(re.findall(r"step +(\d+)/", program.printed()[0])[-1])

        def running() -> bool:
            assert program.is_running(), program.printed()
            return True

        wait(lambda: running() and (root / "step-00000005").is_dir())
        with filler.open("wb") as file:
            try:
                while True:
                    file.write(bytes(65536))
                    file.flush()
            except OSError:
                pass
        wait(lambda: running() and "training continues" in program.printed()[0])
        before = step()
        wait(lambda: running() and step() > before + 20)
        saved = [path.name for path in root.glob("step-*")]
        filler.unlink()
        wait(lambda: running() and set(saved) < {path.name for path in root.glob("step-*")})
        out, err = program.printed()
    assert "Traceback" not in out + err
    assert re.search(r"cannot write the checkpoint: .*(no space: |No space left)", out)
