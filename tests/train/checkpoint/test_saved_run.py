"""Runs with checkpoints beside training, in object stores, and their `--check`."""

import re
import threading
from pathlib import Path

import pytest

from tests.train.in_process import train
from train.checkpoint import checkpoint
from train.report.metrics import read_lines


def test_a_run_writes_the_same_files_with_and_without(
    overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for setting in ("true", "false"):
        folder = tmp_path / setting
        words = [f"--run.dir={folder}", "--checkpoint.every=3", "--checkpoint.keep=9"]
        more = ["--validation.every=6", "--checkpoint.keep_best=1"]
        assert train(*overrides, *words, *more, f"--checkpoint.async_save={setting}") == 0
        out = capfd.readouterr().out
        assert re.findall(r"^saved .*step-(\d+)$", out, re.M) == [
            f"{step:08d}" for step in (3, 6, 9, 12)
        ]
        found[setting] = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*.safetensors")
        }
        manifest = checkpoint.read_manifest(folder / "checkpoints" / "step-00000006")
        losses = read_lines(folder / "metrics.jsonl")
        assert manifest.state["validation_loss"] == losses[5]["validation_loss"]
        assert "checkpoint/blocked_s" in losses[3]
    assert found["true"] == found["false"] and len(found["true"]) == 4
    assert "checkpoint" not in {thread.name for thread in threading.enumerate()}
