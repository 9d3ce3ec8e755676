"""Runs with checkpoints beside training, and their `--check`."""

import fcntl
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import JobConfig
from tests.runs import TINY
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
        more = ["--validation.every=2", "--checkpoint.keep_best=1", "--train.steps=3"]
        assert train(*overrides, *words, *more, f"--checkpoint.async_save={setting}") == 0
        out = capfd.readouterr().out
        assert re.findall(r"^saved .*step-(\d+)$", out, re.M) == [
            f"{step:08d}" for step in (1, 2, 3)
        ]
        found[setting] = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*.safetensors")
        }
        manifest = checkpoint.read_manifest(folder / "checkpoints" / "step-00000002")
        losses = read_lines(folder / "metrics.jsonl")
        assert manifest.state["validation_loss"] == losses[1]["validation_loss"]
        assert "checkpoint/blocked_s" in losses[1]
    assert found["true"] == found["false"] and len(found["true"]) == 3
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
