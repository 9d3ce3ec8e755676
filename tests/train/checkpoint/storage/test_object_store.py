"""Checkpoints and runs in object stores: a server of the S3 protocol, and the memory of this
process."""

import json
import os
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from parallel.ranks import Ranks, start_ranks, stop_ranks
from tests.runs import TINY, run
from tests.train.in_process import train
from train.checkpoint import checkpoint, retention
from train.checkpoint.checkpoint import CheckpointError, Retention
from train.checkpoint.manifest import faults_of_files
from train.checkpoint.storage.addresses import storage_at
from train.checkpoint.storage.base import Storage, finish
from train.checkpoint.storage.client import WriterProcess
from train.checkpoint.storage.object_store import ObjectStorage
from train.checkpoint.storage.process import open_storage
from train.report.metrics import read_lines

RANKS: Ranks


@pytest.fixture
def ranks() -> Iterator[None]:
    """Not for the whole module, because runs start their own."""
    global RANKS
    RANKS = start_ranks(threads=1)
    yield
    stop_ranks()


@pytest.fixture(params=["s3", "memory"])
def storage(request: pytest.FixtureRequest, ranks: None) -> Storage:
    base = request.getfixturevalue("s3_server") if request.param == "s3" else "memory://store"
    retention._SOUND.clear()
    return storage_at(f"{base}/{uuid.uuid4().hex}/run")


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((300, 100), float(step)), "n": torch.tensor([step])}


def save(storage: Storage, step: int, keep: int = 99, loss: float | None = None) -> str:
    state = {"step": step} | ({} if loss is None else {"validation_loss": loss})
    return checkpoint.save(storage, tensors(step), state, {}, Retention(keep, 0, 1), RANKS)


def load(storage: Storage, name: str, folder: Path) -> None:
    manifest = storage.read_manifest(name)
    local = folder / name
    local.mkdir()
    storage.fetch(name, manifest.files, local)
    found = checkpoint.Manifest(
        local, manifest.boxes, manifest.files, manifest.dtypes, manifest.state, {}
    )
    assert not faults_of_files(found)
    live = tensors(0)
    checkpoint.load(found, live)
    assert all(torch.equal(live[n], t) for n, t in tensors(manifest.step).items())


def test_round_trip_and_retention(storage: Storage, tmp_path: Path) -> None:
    storage.check()
    assert storage.names() == []
    for step, loss in ((1, None), (2, 0.5), (3, 0.7), (4, None), (10, 0.9)):
        assert save(storage, step, keep=2, loss=loss) == f"{storage.address()}/step-{step:08d}"
    assert storage.names() == ["step-00000002", "step-00000004", "step-00000010"]
    for name in storage.names():
        load(storage, name, tmp_path)
    with pytest.raises(CheckpointError, match="exists already"):
        save(storage, 10)


def test_incomplete_ones_are_ignored_and_removed(storage: Storage) -> None:
    assert isinstance(storage, ObjectStorage)
    fs, root = storage._fs, storage._root
    save(storage, 1)
    partial = storage.begin("step-00000002", 0)
    finish(storage.write(partial, "rank-00000.safetensors", [b"x" * 10]))
    assert storage.names() == ["step-00000001"], "killed here"
    fs.pipe_file(f"{root}/notes.txt", b"of the user")
    save(storage, 3)
    assert storage.names() == ["step-00000001", "step-00000003"]
    assert not [path for path in fs.find(root) if "step-00000002" in path]
    assert fs.cat_file(f"{root}/notes.txt") == b"of the user"


@pytest.mark.parametrize(
    "storage",
    # a run below sets one aside on a server
    [pytest.param("s3", marks=pytest.mark.slow), "memory"],
    indirect=True,
)
def test_damage_is_found_and_set_aside(storage: Storage, tmp_path: Path) -> None:
    assert isinstance(storage, ObjectStorage)
    fs, root = storage._fs, storage._root
    for step in (1, 2, 3, 4, 5):
        save(storage, step)
    cut, lost, other = (f"{root}/step-0000000{step}/rank-00000.safetensors" for step in (2, 3, 4))
    fs.pipe_file(cut, fs.cat_file(cut)[:-1])
    fs.rm_file(lost)
    text = json.loads(fs.cat_file(f"{root}/step-00000004/manifest.json"))
    text["files"]["../step-00000001/rank-00000.safetensors"] = {"bytes": 1, "crc32": 0}
    fs.pipe_file(f"{root}/step-00000004/manifest.json", json.dumps(text).encode())
    for name, expected in (
        ("step-00000002", "bytes, expected"), ("step-00000003", "missing"),
        ("step-00000004", "checksum differs"), ("step-00000009", "missing"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=expected) as caught:
            storage.read_manifest(name)
        assert "\n" not in str(caught.value)
    for step in (2, 3, 4):
        assert "renamed" in storage.set_aside(f"step-0000000{step}")
    assert storage.names() == ["step-00000001", "step-00000005"]
    assert fs.exists(other), "kept for inspection"
    save(storage, 6)
    assert not fs.exists(cut) and fs.exists(other), "the newest two are kept"
    save(storage, 4)  # the run comes to this step again
    load(storage, "step-00000004", tmp_path)


@pytest.mark.slow  # a run below saves with this process
def test_the_writer_process_writes_to_a_server(s3_server: str, ranks: None) -> None:
    writer = WriterProcess(f"{s3_server}/{uuid.uuid4().hex}")
    try:
        partial = writer.call("begin", name="step-00000001", needed=0)
        writer.call("commit_parts", b"", partial=partial, name="step-00000001",
                    state={"step": 1}, config={})  # fmt: skip
        assert writer.call("names") == ["step-00000001"]
    finally:
        writer.stop()


@pytest.mark.parametrize("kind", [pytest.param("memory", marks=pytest.mark.slow), "s3"])
def test_a_run_in_an_object_store(
    kind: str, overrides: list[str], tmp_path: Path, s3_server: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    url = f"{s3_server}/x" if kind == "s3" else f"memory://{tmp_path.name}/x"
    overrides = [*overrides, "--checkpoint.async_save=true", "--train.steps=3"]
    words = [f"--checkpoint.dir={url}", "--checkpoint.every=1"]
    in_step = "--checkpoint.async_save=false"
    assert train(*overrides, *words, "--train.steps=2", "--schedule.steps=3", in_step) == 0
    assert not (tmp_path / "run" / "checkpoints").exists()
    storage = storage_at(url)
    assert isinstance(storage, ObjectStorage) and len(storage.names()) == 2
    file = f"{storage._root}/step-00000002/rank-00000.safetensors"
    content = bytearray(storage._fs.cat_file(file))
    content[-1] ^= 1
    storage._fs.pipe_file(file, bytes(content))
    capfd.readouterr()
    assert train(*overrides, *words) == 0
    out = capfd.readouterr().out
    assert "damaged, not used: " in out and f"resuming from {url}/step-00000001\n" in out
    assert f"saved {url}/step-00000003\n" in out
    whole = tmp_path / "whole"
    assert train(*overrides, in_step, f"--run.dir={whole}") == 0
    newest = whole / "checkpoints" / "step-00000003" / "rank-00000.safetensors"
    assert storage._fs.cat_file(file.replace("0002", "0003")) == newest.read_bytes()
    init = [f"--run.dir={tmp_path / 'other'}", f"--checkpoint.init_from={url}", in_step]
    capfd.readouterr()
    assert train(*overrides, *init, "--train.steps=1", "--schedule.warmup_steps=0") == 0
    assert f"weights from {url}/step-00000003" in capfd.readouterr().out


@pytest.mark.slow
def test_ranks_share_an_object_store(overrides: list[str], tmp_path: Path, s3_server: str) -> None:
    overrides = [*overrides, "--checkpoint.async_save=true"]
    words = ["-m", "train", TINY, *overrides, f"--checkpoint.dir={s3_server}/ranks"]
    run(*words, "--train.steps=4", "--schedule.steps=12", ranks=2)
    out = run(*words, ranks=1).stdout
    assert f"resuming from {s3_server}/ranks/step-00000004" in out
    whole = tmp_path / "whole"
    run("-m", "train", TINY, *overrides, f"--run.dir={whole}")
    one, other = (
        {r["step"]: r["loss"] for r in read_lines(folder / "metrics.jsonl")}
        for folder in (tmp_path / "run", whole)
    )
    assert one == pytest.approx(other, rel=1e-4)
    done = run(*words[:-1], "--checkpoint.dir=memory://x", ranks=2, code=1)
    assert "is in the memory of one process" in done.stderr and done.stderr.count("\n") == 1


def test_parts_of_files_that_a_killed_process_wrote_are_removed(s3_server: str) -> None:
    """Only those of steps of this run."""
    storage = storage_at(f"{s3_server}/{uuid.uuid4().hex}/run")
    assert isinstance(storage, ObjectStorage)
    bucket, _, root = storage._root.partition("/")
    keys = [
        f"{root}/step-00000001/rank-00000.safetensors", f"{root}/step-00000002/x",
        f"{root}/notes", f"{root}2/step-00000001/x",
    ]  # fmt: skip
    for key in keys:
        upload = storage._fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
        storage._fs.call_s3("upload_part", Bucket=bucket, Key=key, PartNumber=1,
                            UploadId=upload["UploadId"], Body=b"x" * 100)  # fmt: skip
    storage.begin("step-00000002", 0)
    found = storage._fs.call_s3("list_multipart_uploads", Bucket=bucket)["Uploads"]
    assert {upload["Key"] for upload in found} & {*keys} == {*keys[2:]}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_threads_of_transfers_have_the_lowest_priority(s3_server: str) -> None:
    import fsspec.asyn

    before = fsspec.asyn.loop[0], fsspec.asyn.iothread[0]
    fsspec.asyn.loop[0] = None  # as in a new process
    try:
        storage = open_storage(f"{s3_server}/{uuid.uuid4().hex}")
        finish(storage.write("step-00000001", "a", [b"x" * 1000]))
        transfers = fsspec.asyn.iothread[0]
    finally:
        fsspec.asyn.loop[0], fsspec.asyn.iothread[0] = before
    assert transfers is not before[1] and transfers.native_id
    assert os.getpriority(os.PRIO_PROCESS, transfers.native_id) == 19
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < 19


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://no-such-bucket/x", "cannot be written"),
        ("nothing://x", "Protocol not known: nothing"),
    ],
)
def test_an_unusable_address_is_one_line(url: str, expected: str, s3_server: str) -> None:
    with pytest.raises(CheckpointError, match=expected) as caught:
        storage_at(url).check()
    assert "\n" not in str(caught.value) and url.split("/")[2] in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def refuse(name: str, *rest: object) -> object:
        if name.split(".")[0] == "s3fs":
            raise ImportError(name)
        return real(name, *rest)  # type: ignore[arg-type]

    import fsspec
    from fsspec.registry import _registry

    monkeypatch.setitem(_registry, "s3", None)
    monkeypatch.delitem(_registry, "s3")
    monkeypatch.setattr(builtins, "__import__", refuse)
    for name in ("s3fs", "s3fs.core"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    assert fsspec is not None
    with pytest.raises(CheckpointError, match=r"needs the package s3fs: pip install s3fs"):
        storage_at("s3://bucket/x")
