"""Sweeps: their combinations, their job arrays (run by bash), and the table of results."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from launch import local, slurm
from launch.sweep import results, variants
from tests.runs import ROOT, TINY, environment


def test_every_combination_occurs_once() -> None:
    found = variants(["parallel.ep=1,2", 'data.source="a,b",c'], [1, 4])
    assert len(found) == 8 and len({one.name for one in found}) == 8
    assert [one.nodes for one in found] == [1] * 4 + [4] * 4
    assert found[1].overrides == ("--parallel.ep=1", "--data.source=c")
    assert found[0].overrides == ("--parallel.ep=1", '--data.source="a,b"')
    assert found[-1].name == "ep=2-source=c-n4"
    assert variants(["train.profile=[1,2],[3]"], [1])[0].overrides == ("--train.profile=[1,2]",)
    assert {one.name for one in variants(["a.b=x/y,x:y"], [1])} == {"0-b=x_y", "1-b=x_y"}
    assert [one.name for one in variants([], [1])] == ["only"]


@pytest.mark.parametrize(
    ("settings", "nodes"),
    [
        (["ep=1"], [1]), (["parallel.ep"], [1]), (["parallel.ep=1,,2"], [1]),
        (["parallel.ep=1,1"], [1]), (["parallel.ep=1", "parallel.ep=2"], [1]),
        (["run.dir=a,b"], [1]), ([], [1, 1]), ([], [0]), (["$(id).x=1"], [1]),
        (["a.b=" + ",".join(map(str, range(1001)))], [1]),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_wrong_sweeps_are_one_line(settings: list[str], nodes: list[int]) -> None:
    with pytest.raises(UserError) as refused:
        variants(settings, nodes)
    assert "\n" not in str(refused.value)


def test_a_key_that_is_varied_and_fixed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", str(TINY), "--set=run.seed=1,2", "--run.seed=3"]
    for main, size in ((slurm.main, "--nodes=1"), (local.main, "--nproc=1")):
        assert main([*words, size]) == 2
        assert capsys.readouterr().err == (
            "error: --run.seed=3: --set has other values of this key; leave one of them out\n"
        )


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash not found")
def test_each_task_of_the_array_trains_its_variant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(TINY), "--nodes=1,2", "--set", "parallel.ep=1,2", "--set=optimizer.lr=1e-3",
             f"--run.dir={tmp_path / 'all'}", "--dry-run", "--train.global_batch=16"]  # fmt: skip
    assert slurm.main(["sweep", *words, "--set=train.micro_batch=1"]) == 2
    assert "parallel.ep = 2" in capsys.readouterr().err, "one rank has no two"
    assert slurm.main(["sweep", *(w.replace("=1,2", "=2,4") for w in words)]) == 2
    capsys.readouterr()
    words = [word.replace("ep=1,2", "dp_replicate=1") for word in words]
    assert slurm.main(["sweep", *words, "--set=run.seed=5,6"]) == 0
    scripts = capsys.readouterr().out.split("#!/bin/bash")[1:]
    assert ["--nodes=1" in scripts[0], "--nodes=2" in scripts[1]] == [True, True]
    for script in scripts:
        assert "#SBATCH --array=0-1\n" in script and "job-%A-%a.log" in script
        case = script[script.index('case "$SLURM') : script.index("esac") + 4]
        for task, seed in (("0", 5), ("1", 6)):
            printed = subprocess.run(
                ["bash", "-c", case + '\nprintf "%s\\n" "${ARGUMENTS[@]}"'],
                env=os.environ | {"SLURM_ARRAY_TASK_ID": task}, capture_output=True, text=True,
            ).stdout.splitlines()  # fmt: skip
            assert f"--run.seed={seed}" in printed
            assert f"seed={seed}" in printed[-1] and printed[-1].startswith("--run.dir=")


def test_the_table_has_the_figures_of_the_runs(tmp_path: Path) -> None:
    for name, speed in (("a", 100.0), ("b", 200.0)):
        (tmp_path / name).mkdir()
        lines = [
            {"step": i, "loss": 3 / i, "tokens_per_s": speed + i, "memory_gib": i / 10}
            for i in range(1, 4)
        ]
        lines[-1]["validation_loss"] = 2.5
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    (tmp_path / "c").mkdir()
    table = results(tmp_path)
    assert "| a | 3 | 1.0000 | 2.5000 | 102 | 0.30 |\n" in table
    assert "| c | none | | | | |\n" in table
    assert (tmp_path / "results.md").read_text() == table
    with pytest.raises(UserError, match="no runs in it"):
        results(tmp_path / "c")


def test_a_local_sweep_starts_every_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    class Supervisor:
        def __init__(
            self, words: list[str], ranks: int, folder: Path, limits: object, health: object
        ) -> None:
            started.append((words[-1], ranks, folder.name))
            folder.mkdir(parents=True)
            record = {"step": 2, "loss": 1.0, "tokens_per_s": 9, "memory_gib": 0.1}
            (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")

        def run(self) -> int:
            return 0 if len(started) < 3 else 75

    monkeypatch.setattr(local, "Supervisor", Supervisor)
    words = ["sweep", str(TINY), "--nproc=1,2", f"--run.dir={tmp_path}"]
    assert local.main([*words, "--set", "run.seed=1"]) == 0
    assert "| seed=1-n2 | 2 |" in capsys.readouterr().out
    assert local.main([*words, "--set", "run.seed=3,4"]) == 75, "a stopped sweep ends"
    assert [(ranks, name) for _, ranks, name in started] == [
        (1, "seed=1-n1"), (2, "seed=1-n2"), (1, "seed=3-n1"),
    ]  # fmt: skip
    assert all(word == f"--run.dir={tmp_path / name}" for word, _, name in started)
    monkeypatch.setattr(Supervisor, "run", lambda run: 2 if len(started) == 4 else 0)
    assert local.main([*words, "--set", "run.seed=5,6"]) == 2
    said = capsys.readouterr()
    assert "error: 1 of 4 runs failed: seed=5-n1 (exit code 2)\n" in said.err
    assert len(started) == 7 and "| seed=6-n2 |" in said.out, "the others are trained"


@pytest.mark.slow
def test_a_local_sweep_trains_every_variant(overrides: list[str], tmp_path: Path) -> None:
    command = ["-m", "launch.local", "sweep", str(TINY), "--set", "run.seed=1,2", "--train.steps=2"]
    done = subprocess.run(
        [sys.executable, *command, *overrides], cwd=ROOT, env=environment(), text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| seed=1 | 2 |" in done.stdout and "| seed=2 | 2 |" in done.stdout
    losses = [(tmp_path / "run" / f"seed={seed}" / "metrics.jsonl").read_text() for seed in (1, 2)]
    assert losses[0] != losses[1]
