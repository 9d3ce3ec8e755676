"""Runs with checkpoints beside training, in object stores, and their `--check`."""

import fcntl
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import JobConfig
from tests.runs import TINY, run
from tests.train.in_process import train
from train import check
from train.__main__ import main
from train.checkpoint import checkpoint
from train.checkpoint.manifest import Unavailable
from train.checkpoint.storage.addresses import storage_at
from train.checkpoint.storage.object_store import ObjectStorage
from train.convert.hf_export import export_hf
from train.report.metrics import read_lines


@pytest.fixture
def overrides(overrides: list[str]) -> list[str]:
    """Those of all tests, with asynchronous checkpoints."""
    return [*overrides, "--checkpoint.async_save=true"]


def test_a_run_writes_the_same_files_with_and_without(
    overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for setting in ("true", "false"):
        folder = tmp_path / setting
        words = [f"--run.dir={folder}", "--checkpoint.every=1", "--checkpoint.keep=9"]
        more = ["--validation.every=2", "--checkpoint.keep_best=1", "--train.steps=4"]
        assert train(*overrides, *words, *more, f"--checkpoint.async_save={setting}") == 0
        out = capfd.readouterr().out
        assert re.findall(r"^saved .*step-(\d+)$", out, re.M) == [
            f"{step:08d}" for step in (1, 2, 3, 4)
        ]
        found[setting] = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*.safetensors")
        }
        manifest = checkpoint.read_manifest(folder / "checkpoints" / "step-00000002")
        losses = read_lines(folder / "metrics.jsonl")
        assert manifest.state["validation_loss"] == losses[1]["validation_loss"]
        assert "checkpoint/blocked_s" in losses[1]
    assert found["true"] == found["false"] and len(found["true"]) == 4
    assert "checkpoint" not in {thread.name for thread in threading.enumerate()}


def test_check_prints_the_size_of_the_copy(
    overrides: list[str], capfd: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    real, made = check.predict, dict[str, Any]()

    def once(config: JobConfig, dims: Any, device: str, compute: torch.dtype) -> Any:
        """The first prediction: the other two checks are of the same model."""
        if device not in made:
            made[device] = real(config, dims, device, compute)
        return made[device]

    monkeypatch.setattr(check, "predict", once)

    def copies(*more: str) -> list[str]:
        assert main([str(TINY), *overrides, "--check", "--ranks=1", *more]) == 0
        return re.findall(r"^  copy of a checkpoint +(\S+) MiB", capfd.readouterr().out, re.M)

    words = ["--model.d_model=64"]
    (predicted,) = copies(*words)
    assert copies(*words, "--checkpoint.async_save=false") == []
    assert copies(*words, "--checkpoint.every=0") == []
    words += ["--train.steps=1", "--schedule.warmup_steps=0", "--checkpoint.async_save=false"]
    assert train(*overrides, *words) == 0
    (file,) = (tmp_path / "run" / "checkpoints" / "step-00000001").glob("*.safetensors")
    assert float(predicted) * 2**20 == pytest.approx(file.stat().st_size, rel=0.05)


def test_another_folder_is_found_by_export_and_lock(
    overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "elsewhere"
    words = [*overrides, f"--checkpoint.dir={place}", "--train.steps=2"]
    assert train(*words) == 0 and len(checkpoint.checkpoints(place)) == 1
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert export_hf(tmp_path / "run", None, torch.float32) == tmp_path / "run" / "export"
    with (place / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert train(*words, f"--run.dir={tmp_path / 'second'}") == 2
    assert f"{place}: another process is training" in capfd.readouterr().err
    assert train(*overrides, "--checkpoint.dir=/") == 2


@pytest.mark.parametrize("kind", [pytest.param("memory", marks=pytest.mark.slow), "s3"])
def test_a_run_in_an_object_store(
    kind: str, overrides: list[str], tmp_path: Path, s3_server: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    url = f"{s3_server}/x" if kind == "s3" else f"memory://{tmp_path.name}/x"
    overrides = [*overrides, "--train.steps=3"]
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


def test_a_store_that_does_not_answer_is_no_damage(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    url = f"memory://{tmp_path.name}/away"
    words = [*overrides, f"--checkpoint.dir={url}", "--checkpoint.every=1", "--checkpoint.keep=9"]
    words += ["--schedule.warmup_steps=1", "--checkpoint.async_save=false"]
    assert train(*words, "--train.steps=2") == 0
    real = ObjectStorage.fetch

    def fetch(storage: ObjectStorage, name: str, *rest: Any) -> None:
        if name == "step-00000002":
            raise Unavailable(f"{storage.address(name)}: cannot be read: timed out")
        real(storage, name, *rest)

    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStorage, "fetch", fetch)
        assert train(*words, "--train.steps=3") == 0
        out = capfd.readouterr().out
    assert f"not available, not used: {url}/step-00000002: cannot be read: timed out\n" in out
    assert f"resuming from {url}/step-00000001\n" in out and "renamed" not in out
    assert storage_at(url).names() == [f"step-{step:08d}" for step in (1, 2, 3)]
