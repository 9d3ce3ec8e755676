"""Saves beside training: what they write, what they do about errors, and that none is lost."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import CheckpointConfig
from parallel.ranks import Ranks, start_ranks, stop_ranks
from train.checkpoint import background_save, checkpoint, host_buffer, saver
from train.checkpoint.checkpoint import CheckpointError
from train.checkpoint.saver import Saver
from train.checkpoint.storage import client
from train.checkpoint.storage.local import LocalStorage

RANKS: Ranks
FAULTY = """
import os, sys, time
sys.path[0] = {root!r}
real = os.fsync
def fsync(file):
    {fault}
    real(file)
os.fsync = fsync
from train.checkpoint.storage.process import main
main(*sys.argv[1:])
"""
"""A writer process in which `fault` happens in each fsync."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[None]:
    global RANKS
    RANKS = start_ranks(threads=1)
    yield
    stop_ranks()


@pytest.fixture
def make(ranks: None, tmp_path: Path) -> Iterator[Callable[..., Saver]]:
    made: list[Saver] = []

    def create(**settings: Any) -> Saver:
        config = CheckpointConfig(**{"keep": 99, **settings})
        made.append(Saver(LocalStorage(tmp_path), config, {}, RANKS))
        return made[-1]

    yield create
    for one in made:
        one.close()


def faulty(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    program = FAULTY.format(root=client._ROOT, fault=fault)
    monkeypatch.setattr(client, "PROGRAM", program)
    monkeypatch.setattr(background_save, "_LONGEST_PAUSE_S", 0.05)


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((64, 3), float(step)), "n": torch.tensor(step)}


def sound(root: Path) -> list[int]:
    found = []
    for path in checkpoint.checkpoints(root):
        manifest = checkpoint.read_manifest(path)
        checkpoint.verify_files(manifest)
        live = tensors(0)
        checkpoint.load(manifest, live)
        assert all(torch.equal(live[name], t) for name, t in tensors(manifest.step).items())
        found.append(manifest.step)
    return found


def wait(one: Saver) -> None:
    deadline = time.monotonic() + 30
    while one._active is not None:
        assert time.monotonic() < deadline
        one.poll()
        time.sleep(0.002)


def test_later_changes_are_not_saved(make: Callable[..., Saver], tmp_path: Path) -> None:
    one, live = make(), tensors(1)
    for step in (1, 2, 3):
        for name, tensor in tensors(step).items():
            live[name].copy_(tensor)
        one.save(live, {"step": step})
        for tensor in live.values():
            tensor.fill_(-1)  # the next step
    one.finish()
    assert sound(tmp_path) == [1, 2, 3] and one.saved == 3
    assert [line.split()[0] for line in one.lines()] == ["saved"] * 3
    fields = one.fields()
    assert fields["checkpoint/blocked_s"] > 0 and "checkpoint/failures" not in fields


def test_one_save_at_a_time_and_a_slow_disk_stops_no_step(
    make: Callable[..., Saver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty(monkeypatch, "time.sleep(0.15)")
    monkeypatch.setattr(saver, "_PATIENCE_S", 0.05)
    one = make()
    one.save(tensors(1), {"step": 1})
    start = time.monotonic()
    for step in (2, 3, 4):
        one.save(tensors(step), {"step": step})
        assert not one.is_owed, "the first is still being written"
    assert time.monotonic() - start < 0.15 * 3, "only the second waited"
    said = one.lines()
    assert len(said) == 1 and "being written for" in said[0], said
    wait(one)
    assert one.is_owed and one.saved == 1
    one.save(tensors(5), {"step": 5})
    one.finish()
    assert not one.is_owed and sound(tmp_path) == [1, 5]


def test_an_error_is_said_and_the_save_repeated(
    make: Callable[..., Saver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the system, of the program, and the end of the writer process, one after another."""
    once = tmp_path.parent / f"{tmp_path.name}-once"
    code = f"if os.path.exists({str(once)!r}): found = open({str(once)!r}).read(); "
    faulty(monkeypatch, code + f"os.remove({str(once)!r}); exec(found)")
    one = make()
    for step, (fault, expected) in enumerate(
        (
            ("raise OSError(28, 'No space left on device')", "No space left on device"),
            ("raise ValueError('unforeseen')", "ValueError: unforeseen"),
            ("os.kill(os.getpid(), 9)", "was ended by signal 9"),
        ),
        start=1,
    ):
        once.write_text(fault)
        one.save(tensors(step), {"step": step})
        wait(one)
        said, address = one.lines(), str(tmp_path / f"step-{step:08d}")
        assert len(said) == 2 and said[1] == f"saved {address}"
        assert expected in said[0] and "training continues" in said[0] and address in said[0]
        assert sound(tmp_path) == [*range(1, step + 1)] and not list(tmp_path.glob(".*"))
        assert one.fields()["checkpoint/failures"] == 1


def test_a_later_save_replaces_one_that_fails(
    make: Callable[..., Saver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path.parent / f"{tmp_path.name}-full"
    flag.touch()
    faulty(monkeypatch, f"if os.path.exists({str(flag)!r}): raise OSError(28, 'No space left')")
    one = make()
    one.save(tensors(1), {"step": 1})
    while not (said := one.lines()):
        time.sleep(0.01)
    assert "training continues" in said[0]
    one.save(tensors(2), {"step": 2})
    flag.unlink()
    wait(one)
    assert sound(tmp_path) == [2] and one.saved == 2
    assert any(line.startswith("not saved: ") for line in one.lines())
    flag.touch()
    one.save(tensors(3), {"step": 3})
    one.finish()  # gives up
    assert one.saved == 2 and not list(tmp_path.glob(".*"))
    flag.unlink()
    one.save_now(tensors(3), {"step": 3})
    assert sound(tmp_path) == [2, 3]


@pytest.mark.parametrize("failures", [3, 4])
def test_the_last_save_is_repeated_too(
    failures: int, make: Callable[..., Saver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place that cannot be reached for a moment must not cost the steps since the save before."""
    monkeypatch.setattr(saver, "_PAUSES_S", (0.0, 0.0, 0.0))
    real, left = LocalStorage.begin, [None] * failures

    def begin(storage: LocalStorage, name: str, needed: int) -> str:
        if left:
            left.pop()
            raise OSError(113, "No route to host", str(tmp_path))
        return real(storage, name, needed)

    monkeypatch.setattr(LocalStorage, "begin", begin)
    one = make()
    if failures > 3:
        with pytest.raises(CheckpointError, match=r"cannot write the checkpoint: .*No route"):
            one.save_now(tensors(1), {"step": 1})
        assert one.saved == 0 and sound(tmp_path) == []
        return
    one.save_now(tensors(1), {"step": 1})
    assert one.saved == 1 and sound(tmp_path) == [1]
    assert sum("No route to host; the save is repeated" in line for line in one.lines()) == 3


def test_without_memory_for_a_copy_the_run_waits(
    make: Callable[..., Saver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_buffer, "available_host_memory", lambda: 100)
    one = make()
    one.save(tensors(1), {"step": 1})
    one.save(tensors(2), {"step": 2})
    said = one.lines()
    assert sound(tmp_path) == [1, 2] and "not enough host memory for a copy of" in said[0]
    assert len(said) == 3 and one._writer is None


def test_the_writer_ends_with_its_rank_and_not_by_its_signals(
    make: Callable[..., Saver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty(monkeypatch, "time.sleep(0.1)")
    one = make()
    one.save(tensors(1), {"step": 1})
    while one._writer is None or one._writer._process is None or not list(tmp_path.glob(".*/*")):
        time.sleep(0.005)
    process = one._writer._process
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        process.send_signal(number)
    wait(one)
    assert sound(tmp_path) == [1]
    one.save(tensors(2), {"step": 2})
    while not list(tmp_path.glob(".*/*")):
        time.sleep(0.005)
    assert process.stdin is not None
    process.stdin.close()  # as when the rank is killed
    assert process.wait(10) == 0
    wait(one)  # another one is started
    assert sound(tmp_path) == [1, 2]
