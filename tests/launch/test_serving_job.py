"""The serving job, run by bash with programs in place of SLURM's: engines and router get the right
words, are started again, and stop together; and its refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from configs.errors import UserError
from launch import slurm
from launch.serving import read_serving_job, serving_script
from tests.launch.test_render import HOSTILE

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash not found")
SRUN = """#!/bin/bash
tasks=1
while [[ $1 == --* ]]; do
  case $1 in --ntasks=*) tasks=${1#*=} ;; --relative=*) export RELATIVE=${1#*=} ;; esac
  shift
done
for ((i = 0; i < tasks; i++)); do SLURM_NODEID=$i "$@" & tasks_[i]=$!; done
trap 'kill -TERM "${tasks_[@]}" 2>/dev/null' TERM
code=0
for task in "${tasks_[@]}"; do
  while wait "$task"; one=$?; kill -0 "$task" 2>/dev/null; do :; done
  [ "$one" -eq 0 ] || code=$one
done
exit "$code"
"""
SCONTROL = """#!/bin/bash
echo "$@" >>"$FOUND.scontrol"
case "$1 $2" in
  "show hostnames") printf 'n%s\\n' 1 2 3 4 ;;
  "show job") echo "JobId=7 JobState=RUNNING" ;;
  "show node") echo "   NodeAddr=10.0.0.${3#n} NodeHostName=$3" ;;
esac
"""
PYTHON = """#!/bin/bash
exec {python} -c '
import json, os, signal, sys, time
words = sys.argv[1:]
is_router = "sglang_router.launch_router" in words
with open(os.environ["FOUND"], "a") as file:
    place = [os.environ.get(name) for name in ("RELATIVE", "SLURM_NODEID")]
    file.write(json.dumps([words, *place]) + "\\n")
signal.signal(signal.SIGTERM, lambda *_: (print("stopped", flush=True), os._exit(1)))
{body}
' "$@"
"""


class Cluster:
    """Programs that replace SLURM's, and the job scripts that they run."""

    def __init__(self, folder: Path, body: str) -> None:
        self.folder, self.found = folder, folder / "found"
        programs = {
            "srun": SRUN, "scontrol": SCONTROL, "sleep": "#!/bin/bash\n",
            "py": PYTHON.format(python=sys.executable, body=body),
        }  # fmt: skip
        for name, text in programs.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def start(self, arguments: Sequence[str]) -> subprocess.Popen[str]:
        job, site, _ = read_serving_job([*arguments, f"--run={self.folder / 'run'}"])
        script = self.folder / "script"
        script.write_text(serving_script(job, site, python=str(self.folder / "py")))
        env = os.environ | {
            "PATH": f"{self.folder}:{os.environ['PATH']}", "FOUND": str(self.found),
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_NNODES": "4",
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", str(script)], env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def starts(self) -> list[tuple[list[str], str | None, str | None]]:
        if not self.found.is_file():
            return []
        return [json.loads(line) for line in self.found.read_text().splitlines()]

    def wait_for(self, number: int, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 15
        while len(self.starts()) < number:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def is_router(words: list[str]) -> bool:
    return "sglang_router.launch_router" in words


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 1)], ids=["time", "cancel"]
)
def test_engines_and_router_are_started_and_stop_together(
    sent: signal.Signals, code: int, tmp_path: Path
) -> None:
    trap = tmp_path / "executed"
    hostile = [f"--x={word.replace('TRAP', str(trap))}" for word in HOSTILE]
    cluster = Cluster(tmp_path, "time.sleep(60)")
    words = ["an export", "--nodes=4", "--nodes-per-engine=2", "--tp=2", "--port=9000", *hostile]
    with cluster.start(words) as process:
        cluster.wait_for(5, process)
        time.sleep(0.3)
        process.send_signal(sent)
        said, errors = process.communicate(timeout=20)
    assert process.returncode == code, said + errors
    starts = cluster.starts()
    routers = [found for found, _, _ in starts if is_router(found)]
    engines = [one for one in starts if not is_router(one[0])]
    assert len(routers) == 1 and len(engines) == 4, "nothing is started again after the signal"
    assert routers[0][-2:] == ["http://10.0.0.1:9001", "http://10.0.0.3:9002"]
    assert option(routers[0], "--port") == "9000"
    for found, relative, rank in engines:
        assert option(found, "--node-rank") == rank and option(found, "--nnodes") == "2"
        assert option(found, "--master-addr") == {"0": "10.0.0.1", "2": "10.0.0.3"}[str(relative)]
        serve = found[found.index("serve") + 1 :]
        assert serve == [
            "an export", "--tp=2", "--ep=1", "--grace=20", *hostile, "--host", "0.0.0.0",
            "--port", {"0": "9001", "2": "9002"}[str(relative)],
        ]  # fmt: skip
    ports = {relative: option(found, "--master-port") for found, relative, _ in engines}
    assert len({*ports.values()}) == 2, "one rendezvous per engine"
    assert (tmp_path / "run/launch/address").read_text() == "http://10.0.0.1:9000/v1\n"
    assert ("requeue 7" in (tmp_path / "found.scontrol").read_text()) == (code == 75)
    assert not trap.exists()


def test_an_engine_that_ends_is_started_again_and_the_job_ends_with_the_last(
    tmp_path: Path,
) -> None:
    """Both engines fail three times; then nothing is left to route to."""
    cluster = Cluster(tmp_path, "sys.exit(3) if not is_router else time.sleep(60)")
    with cluster.start(["export", "--nodes=2"]) as process:
        said, errors = process.communicate(timeout=30)
    assert process.returncode == 1, errors
    for engine in (0, 1):
        for attempt in (1, 2, 3):
            assert f"engine {engine}, attempt {attempt}: ended with code 3" in said
    starts = [found for found, _, _ in cluster.starts()]
    assert sum(map(is_router, starts)) == 1 and len(starts) == 7
    ports = {option(found, "--master-port") for found in starts if not is_router(found)}
    assert len(ports) == 6, "every attempt has its rendezvous"


def test_without_a_router_the_engines_stop(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "sys.exit(4) if is_router else time.sleep(60)")
    with cluster.start(["export", "--nodes=2"]) as process:
        said, errors = process.communicate(timeout=30)
    assert process.returncode == 1, errors
    assert "router, attempt 3: ended with code 4" in said and said.count("engine") == 1
    assert "requeue" not in (tmp_path / "found.scontrol").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--nodes=3", "--nodes-per-engine=2"], "--nodes 3: must be a multiple of"),
        (["--nodes=2", "--nodes-per-engine=0"], "--nodes-per-engine 0: must be a number"),
        (["--nodes=1", "--tp=2"], "--tp 2 --ep 1: an engine has 1 rank; the larger degree"),
        (["--nodes=6", "--nodes-per-engine=6", "--tp=6", "--ep=4"], "an engine has 6 ranks"),
        (["--nodes=1", "--tp=x"], "--tp x: must be a number"),
        (["--nodes=1", "--port=80"], "--port 80: must lie between 1024 and 65534"),
        (["--nodes=1", "--port=65535"], "--port 65535: must lie between"),
        (["--nodes=1", "--host=::"], "--host=::: the job script sets this option"),
        (["--nodes=1", "--grace=3"], "--grace=3: the job script sets this option"),
        (["--nodes=1", "stray"], "'stray': neither an option nor"),
    ],
    ids=str,
)
def test_a_wrong_serving_job_is_one_line(words: list[str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        read_serving_job(["export", f"--run={tmp_path}", *words])
    assert expected in str(refused.value) and "\n" not in str(refused.value)


def test_an_absent_export_and_a_wrong_policy_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["serve", str(tmp_path / "absent"), "--nodes=1", f"--run={tmp_path / 'run'}"]
    assert slurm.main(words) == 2
    assert "absent: no such folder; name an export" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        slurm.main([*words, "--policy=fastest"])
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()
