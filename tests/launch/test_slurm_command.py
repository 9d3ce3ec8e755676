"""`python -m launch.slurm` and `launch.local` without a cluster: refusals, records, no torch."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from configs.loader import load, to_toml
from configs.parallel_dims import resolve
from launch import cluster, slurm
from launch.experiment import state_bytes_per_rank
from launch.run_folder import read_submission, records, status
from launch.submit import locked
from tests.runs import ROOT, TINY, environment

SITE = '[node]\ngpu = "H100-80GB"\ngpus = 8\n'


@pytest.fixture
def site(tmp_path: Path) -> Path:
    path = tmp_path / "site.toml"
    path.write_text(SITE)
    return path


@pytest.fixture
def fake_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sbatch and squeue that record their words; sbatch prints `jobs.<its number>`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(
        f'#!/bin/bash\n[ "$1" = --test-only ] && exit\necho "$@" >> {folder}/said\n'
        f"env | grep ^SBATCH_ >> {folder}/said\n"
        f"wc -l < {folder}/said\n"
    )
    (folder / "squeue").write_text(f"#!/bin/bash\ncat {folder}/queue 2>/dev/null\nexit 0\n")
    (folder / "scancel").write_text(f'#!/bin/bash\necho "$@" >> {folder}/cancelled\n')
    (folder / "scontrol").write_text("#!/bin/bash\nexit 1\n")
    for path in folder.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert slurm.main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_neither_command_loads_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was loaded')")
    for words in (
        ["launch.slurm", str(TINY), "--nodes=2", "--dry-run", f"--run.dir={tmp_path}"],
        ["launch.local", "absent.toml"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True,
            env=environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        )  # fmt: skip
        assert "torch was loaded" not in done.stderr
        assert done.returncode == (0 if "--dry-run" in words else 2), done.stderr


def test_a_dry_run_prints_the_script_and_writes_nothing(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["configs/deepseek_v3_671b.toml", "--nodes=128", "--site", str(site), "--dry-run"]
    words += [f"--run.dir={run}", "--time=1-00:00:00", "--name=v3", "--partition=big"]
    words.append("--train.global_batch=8192")
    assert slurm.main(words) == 0
    text = capsys.readouterr().out
    for line in ("--nodes=128", "--gres=gpu:8", "--time=1-00:00:00", "--job-name=v3",
                 "--partition=big"):  # fmt: skip
        assert f"#SBATCH {line}\n" in text
    assert not run.exists()
    if shutil.which("bash"):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["absent.toml", "--nodes=1"], "absent.toml: no such file"),
        ([TINY], "the following arguments are required: --nodes"),
        ([TINY, "--nodes=0"], "--nodes 0: must be a number from 1"),
        ([TINY, "--nodes=x"], "--nodes x: must be a number from 1"),
        ([TINY, "--nodes=1", "--jobs=0"], "--jobs 0"),
        ([TINY, "--nodes=1", "--model.moe.topk=1"], "did you mean model.moe.top_k?"),
        ([TINY, "--nodes=1", "--parition=x"], "--parition=x"),
        ([TINY, "--nodes=1", "stray"], "'stray': neither an option nor"),
        ([TINY, "--nodes=3"], "must be a multiple of"),
        ([TINY, "--nodes=2", "--parallel.dp_shard=3"], "but there are 2 ranks"),
        ([TINY, "--nodes=1", "--partition=a;id"], "partition = 'a;id': must be"),
        ([TINY, "--nodes=1", "--name=a b"], "give another with --name"),
        ([TINY, "--nodes=1", "--run.dir=a b", "--name=x"], "SLURM's log file needs a path"),
        ([TINY, "--nodes=1", "--time=tomorrow"], "time = 'tomorrow'"),
        ([TINY, "--nodes=1", "--site=absent.toml"], "absent.toml: no such file"),
        (["status", "absent"], "absent': no such run folder"),
        (["logs", "absent"], "no run that python -m launch.slurm submitted"),
        (["cancel", "absent"], "no run that python -m launch.slurm submitted"),
        (["resume", "absent"], "no run that python -m launch.slurm submitted"),
    ],
    ids=str,
)
def test_a_wrong_command_is_one_line(
    words: list[object], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        said = refused(capsys, *words, *["--dry-run"] * (words[0] == TINY))
    except SystemExit as end:
        assert end.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
    assert expected in said


def test_a_model_too_large_for_the_gpus_is_refused(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["configs/deepseek_v3_671b.toml", "--nodes=2", "--site", site, "--dry-run"]
    said = refused(
        capsys, *words, "--parallel.dp_replicate=1", "--parallel.dp_shard=-1", "--parallel.ep=16"
    )
    assert "GB per rank on 16 ranks" in said and "has 80 GB; use more nodes" in said


@pytest.mark.parametrize("name", ["demo", "deepseek_v3_671b", "gpt_oss_20b", "qwen3_30b_a3b"])
def test_the_predicted_state_is_that_of_the_counted_parameters(name: str) -> None:
    """Reference: the parameters of the model itself. Vectors and biases are left out."""
    from models.counts import parameter_counts

    config = load(
        ROOT / "configs" / f"{name}.toml",
        ["--parallel.ep=1", "--parallel.dp_shard=-1", "--precision.moments=fp32"],
    )
    config = replace(config, train=replace(config.train, global_batch=config.train.micro_batch * 8))
    counts = parameter_counts(config.model)
    dims = resolve(config, 8)
    found = state_bytes_per_rank(config, dims) / 16 * dims.dp_shard * dims.tp
    assert found == pytest.approx(counts.total + counts.mtp, rel=0.01)
    assert found <= counts.total + counts.mtp


def test_a_missing_sbatch_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refused(capsys, TINY, "--nodes=1", f"--run.dir={tmp_path / 'run'}")
    assert "sbatch: not found; run this on a login node" in said


def test_submit_records_what_resume_repeats(
    fake_sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("SBATCH_PARTITION", "elsewhere")
    run = tmp_path / "run"
    words = [str(TINY), "--nodes=2", "--jobs=2", f"--run.dir={run}"]
    assert slurm.main(words) == 0
    assert "job 1, 2\n" in capsys.readouterr().out
    first, second = (fake_sbatch / "said").read_text().splitlines()
    assert first == f"--parsable {run}/launch/chained.train.sbatch", "no SBATCH_ variable"
    assert second == f"--parsable --dependency=afterany:1 {run}/launch/train.sbatch"
    (run / "launch" / "failed_nodes").write_text("n3\nn3\nn4\n")
    assert slurm.main(["resume", str(run)]) == 0
    assert "excluded after repeated failures: n3\n" in capsys.readouterr().out
    assert "#SBATCH --exclude=n3\n" in (run / "launch" / "train.sbatch").read_text()
    record = json.loads((run / "launch" / "submission.json").read_text())
    assert record["arguments"] == words and record["jobs"] == ["1", "2", "3", "4"]
    (fake_sbatch / "queue").write_text("4|4|RUNNING|None\n9|9|RUNNING|None\n")
    assert "job 4 of this run is still queued or running" in refused(capsys, "resume", run)
    assert slurm.main(["status", str(run)]) == 0
    assert "1 ended, 2 ended, 3 ended, 4 RUNNING\n" in capsys.readouterr().out


def test_resume_refuses_a_run_that_was_moved(
    fake_sbatch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb, place in (([], "run.dir"), (["sweep"], "run.dir"), (["serve"], "run")):
        run, moved = tmp_path / "-".join(["run", *verb]), tmp_path / "moved"
        file = tmp_path if verb == ["serve"] else TINY
        more = ["--set=run.seed=1,2"] * (verb == ["sweep"])
        words = [*verb, str(file), "--nodes=2", f"--{place}={run}", *more]
        assert slurm.main(words) == 0
        run.rename(moved)
        said = refused(capsys, "resume", moved)
        assert (
            f"{moved}: was submitted as {run}; move it back" in said
            and f"--{place}={moved}" in said
        )
        shutil.rmtree(moved)
    assert len((fake_sbatch / "said").read_text().splitlines()) == 3, "nothing else was submitted"


def test_of_two_submissions_at_the_same_time_one_is_refused(
    fake_sbatch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [TINY, "--nodes=1", f"--run.dir={run}"]
    with locked(run):
        assert "another submission of this run is under way" in refused(capsys, *words)
    assert not (fake_sbatch / "said").exists() and slurm.main([*map(str, words)]) == 0


def test_a_chain_that_slurm_refuses_in_the_middle_is_recorded(
    fake_sbatch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = (fake_sbatch / "sbatch").read_text()
    limit = f"[ $(cat {fake_sbatch}/said 2>/dev/null | wc -l) = 2 ] && echo limit >&2 && exit 1\n"
    (fake_sbatch / "sbatch").write_text(script.replace("exit\n", f"exit\n{limit}", 1))
    run = tmp_path / "run"
    said = refused(capsys, TINY, "--nodes=1", "--jobs=4", f"--run.dir={run}")
    assert "job 1, 2 submitted; sbatch refused: limit" in said
    assert read_submission(run).jobs == ["1", "2"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"arguments": [], "folder": "", "jobs": []}',
             '{"arguments": 1, "folder": "", "jobs": []}',
             '{"arguments": [], "folder": "", "jobs": ["1; id"]}'],
)  # fmt: skip
def test_a_damaged_record_is_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "submission.json").write_text(text)
    assert "damaged" in refused(capsys, "cancel", tmp_path)


def test_a_job_that_can_never_start_is_cancelled(
    fake_sbatch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fake_sbatch / "queue").write_text("1|1|PENDING|PartitionTimeLimit\n")
    run = tmp_path / "run"
    said = refused(capsys, TINY, "--nodes=1", f"--run.dir={run}")
    assert "would never start this job, it was cancelled: PartitionTimeLimit" in said
    assert (fake_sbatch / "cancelled").read_text() == "--quiet 1\n"
    (fake_sbatch / "queue").write_text("2|2|PENDING|Resources\n")
    assert slurm.main([str(TINY), "--nodes=1", f"--run.dir={run}"]) == 0
    assert read_submission(run).jobs == ["2"]


def test_the_status_of_a_sweep_is_its_table(
    fake_sbatch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep"
    words = ["sweep", str(TINY), "--nodes=2", "--set=run.seed=1,2", f"--run.dir={sweep}"]
    assert slurm.main(words) == 0
    capsys.readouterr()
    assert slurm.main(["status", str(sweep)]) == 0
    assert re.fullmatch(r"jobs +1 ended\n", capsys.readouterr().out)
    (sweep / "seed=1").mkdir()
    (sweep / "seed=1" / "metrics.jsonl").write_text('{"step": 3, "loss": 1.5}\n')
    assert slurm.main(["status", str(sweep)]) == 0
    assert "| seed=1 | 3 | 1.5000 |  |  |  |\n" in capsys.readouterr().out


def test_sbatch_is_quoted_in_one_line(
    fake_sbatch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fake_sbatch / "sbatch").write_text(
        "#!/bin/bash\nprintf 'sbatch: error: no\\nworse\\n' >&2\nexit 1"
    )
    said = refused(capsys, TINY, "--nodes=1", f"--run.dir={tmp_path / 'run'}")
    assert said == "error: sbatch refused: sbatch: error: no worse\n"
    (fake_sbatch / "sbatch").write_text("#!/bin/bash\necho hello")
    assert "not the number of a job" in refused(
        capsys, TINY, "--nodes=1", f"--run.dir={tmp_path / 'run'}"
    )


def test_arrays_of_the_queue_are_found_by_their_id(fake_sbatch: Path) -> None:
    (fake_sbatch / "queue").write_text("12|11|RUNNING|None\n13|11|PENDING|Resources\n")
    assert cluster.queue(["11"]) == {"11": "PENDING (Resources)"}
    assert cluster.queue([]) == {}


@pytest.mark.parametrize(
    "record",
    [
        '"loss": null', '"loss": "x"', '"loss": NaN, "step_s": NaN', '"loss": 1, "step_s": null',
        '"loss": 1, "step_s": [1]', '"loss": 1e999, "tokens_per_s": 1e999', '"loss": 1, "step": -1',
        '"loss": 1, "step": true', '"loss": 1, "validation_loss": null', '"loss": 1e5000',
        '"loss": 1, "step_s": 1' + "0" * 400, '"loss": 1, "memory_gib": "x"',
    ],
)  # fmt: skip
def test_no_record_breaks_status_and_results(
    record: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (run / "config.toml").write_text(to_toml(load(TINY)))
    (run / "metrics.jsonl").write_text('{"step": 1, "step_s": 1, ' + record + "}\n")
    assert slurm.main(["status", str(run)]) == slurm.main(["results", str(run.parent)]) == 0
    assert capsys.readouterr().err == ""


def test_status_reads_the_files_of_a_run(tmp_path: Path) -> None:
    assert status(tmp_path)["step"] == "none yet"
    config = load(TINY, ["--train.steps=100"])
    (tmp_path / "config.toml").write_text(to_toml(config))
    lines = [{"step": i, "loss": 5 - i / 10, "step_s": 0.5 if i % 2 else 2.0, "tokens_per_s": 512}
             for i in range(1, 40)]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + 'damaged\n{"step": 40, "lo')
    (tmp_path / "environment.json").write_text("[{}, {}]")
    (tmp_path / "checkpoints" / "step-00000030").mkdir(parents=True)
    assert len(records(tmp_path)) == 39
    found = status(tmp_path)
    assert found["step"] == "39 of 100" and found["loss"] == "1.1000" and found["starts"] == "2"
    assert found["checkpoint"] == "step-00000030"
    assert found["eta"] == "0:01:16 of steps", "61 steps of 1.25 s, the median of the last 20"
