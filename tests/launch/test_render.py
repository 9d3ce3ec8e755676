"""Job scripts, run by bash with programs in place of SLURM's: words reach torchrun unchanged,
nothing else is executed, and every end of an attempt has its exit code."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import UserError
from launch.render import Job, training_script
from launch.site import FaultSite, NodeSite, Site, SlurmSite, SoftwareSite

HOSTILE = [
    "$(touch TRAP)", "`touch TRAP`", "; touch TRAP #", "' ; touch TRAP ; '", '" ; touch TRAP ; "',
    "a\nb", "--opt=*", "\\", "%j %{directives}", "| touch TRAP", "${x:=$(touch TRAP)}", "!!", "~",
]  # fmt: skip
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
export SLURM_NODEID=0
exec "$@"
"""
PYTHON = """#!/bin/bash
exec {python} -S -c '
import json, os, signal, sys
open(os.environ["FOUND"], "a").write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
{body}
' "$@"
"""
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash not found")


class FakeSlurm:
    """A folder of programs that replace those of SLURM, and the python of the nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found = folder, folder / "found"
        self.program("srun", SRUN)
        self.scontrol("RUNNING")
        self.program("module", "#!/bin/bash\n")
        self.python("sys.exit(0)")

    def scontrol(self, state: str, requeue: str = "true") -> None:
        """state: of the job. requeue: command that answers `scontrol requeue`."""
        self.program(
            "scontrol",
            f'#!/bin/bash\necho "$@" >> {self.folder}/asked\n'
            f'case "$1 $2" in "show job") echo "JobId=7 JobState={state} Reason=None" ;;\n'
            f"requeue*) {requeue} ;; *) echo n1 ;; esac\nexit\n",
        )

    def program(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def python(self, body: str) -> str:
        self.program("py", PYTHON.format(python=sys.executable, body=body))
        return str(self.folder / "py")

    def start(self, text: str, **more: str) -> subprocess.Popen[str]:
        script = self.folder / "script"
        script.write_text(text)
        env = os.environ | {
            "PATH": f"{self.folder}:{os.environ['PATH']}", "FOUND": str(self.found),
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1", **more,
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", str(script)], env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def starts(self) -> list[tuple[list[str], dict[str, str]]]:
        if not self.found.is_file():
            return []
        return [json.loads(line) for line in self.found.read_text().splitlines()]


@pytest.fixture
def fake(tmp_path: Path) -> FakeSlurm:
    (tmp_path / "bin").mkdir()
    return FakeSlurm(tmp_path / "bin")


def job_of(tmp_path: Path, *words: str, **more: object) -> Job:
    values: dict[str, object] = {
        "name": "demo", "nodes": 1, "folder": tmp_path / "run", "runs": (words,),
        "command": "a command", "start_in": tmp_path,
    }  # fmt: skip
    return Job(**(values | more))  # type: ignore[arg-type]


def test_hostile_words_reach_the_ranks_unchanged(fake: FakeSlurm, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    words = [text.replace("TRAP", str(trap)) for text in HOSTILE]
    values = [word for word in words if "\n" not in word]
    folder = tmp_path / "a $(touch executed) 'folder"
    folder.mkdir()
    site = Site(
        software=SoftwareSite(environment=tuple(f"V{i}={v}" for i, v in enumerate(values))),
        node=NodeSite(scratch=f"/$(touch {trap})'\"", interface="eth0", ranks=3, cpus=6),
    )
    job = job_of(tmp_path, *words, start_in=folder, command=f"x\n touch {trap}\r\ntouch {trap}")
    text = training_script(job, site, python=fake.python("print(os.getcwd())"))
    process = fake.start(text)
    said, errors = process.communicate(timeout=20)
    assert process.returncode == 0 and "complete" in said, errors
    ((arguments, env),) = fake.starts()
    assert arguments[arguments.index("train") + 1 :] == words
    assert [env[f"V{i}"] for i in range(len(values))] == values
    assert env["TMPDIR"] == site.node.scratch and env["NCCL_SOCKET_IFNAME"] == "eth0"
    assert env["OMP_NUM_THREADS"] == "2" and str(folder) in said
    assert not trap.exists() and not list(tmp_path.rglob("executed"))


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "a b"}, {"name": "x\n#SBATCH --uid=0"}, {"name": "$(id)"}, {"name": "-x"},
        {"name": ""}, {"folder": Path("/a b")}, {"folder": Path("/a\n#SBATCH --uid=0")},
        {"folder": Path("/a%x")}, {"folder": Path("/a'")}, {"folder": Path("/$(id)")},
    ],
    ids=str,
)  # fmt: skip
def test_names_that_a_directive_cannot_hold_are_refused(
    changed: dict[str, object], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        training_script(job_of(tmp_path, "x", **changed), Site())
    assert "\n" not in str(refused.value)


def test_directives_state_what_the_site_and_the_job_ask_for(tmp_path: Path) -> None:
    site = Site(
        slurm=SlurmSite(partition="p", account="a", qos="q", exclude="n1", constraint="c"),
        node=NodeSite(gpu="H100-80GB", gpus=8, cpus=96, numa_binding=True),
        software=SoftwareSite(activate="/v", container=("apptainer", "exec", "i m")),
    )
    text = training_script(job_of(tmp_path, "x", nodes=16, exclude=("n3",)), site)
    directives = {line[8:] for line in text.splitlines() if line.startswith("#SBATCH ")}
    assert directives == {
        "--job-name=demo", "--nodes=16", "--ntasks-per-node=1", "--cpus-per-task=96",
        "--gres=gpu:8", "--partition=p", "--account=a", "--qos=q", "--constraint=c",
        "--exclude=n1,n3", "--time=24:00:00", "--signal=B:USR1@300", "--open-mode=append",
        f"--output={tmp_path}/run/launch/job-%j.log", "--requeue",
    }  # fmt: skip
    assert "exec apptainer exec 'i m' /v/bin/python -m torch.distributed.run" in text
    assert "--numa-binding node" in text and "export OMP_NUM_THREADS=12" in text


def test_failed_attempts_are_bounded_and_each_has_its_port(fake: FakeSlurm, tmp_path: Path) -> None:
    body = 'print("srun: error: n1: task 0: Exited with exit code 1", file=sys.stderr); sys.exit(3)'
    site = Site(faults=FaultSite(attempts=4))
    process = fake.start(training_script(job_of(tmp_path), site, python=fake.python(body)))
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 3 and said.count("failed with code 3, first on n1") == 4
    ports = [a[a.index("--master-port") + 1] for a, _ in fake.starts()]
    assert len(set(ports)) == 4
    assert (tmp_path / "run/launch/failed_nodes").read_text() == "n1\n" * 4
    assert "requeue" not in (fake.folder / "asked").read_text()


def test_an_error_of_the_user_is_not_repeated(fake: FakeSlurm, tmp_path: Path) -> None:
    """torchrun ends with 1 whatever the ranks' code is; its report in the log has the code."""
    log = tmp_path / "run/launch/7-0-1-node0.log"
    log.parent.mkdir(parents=True)
    log.write_text("error: no file\nRoot Cause\n  rank      : 0\n  exitcode  : 2 (pid: 26)\n")
    process = fake.start(
        training_script(job_of(tmp_path), Site(), python=fake.python("sys.exit(1)"))
    )
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 2 and "not repeated" in said and len(fake.starts()) == 1
    assert "\nerror: no file\n" in said
    log.write_text("  exitcode  : 26 (pid: 2)\n")
    process = fake.start(
        training_script(job_of(tmp_path), Site(), python=fake.python("sys.exit(1)"))
    )
    process.communicate(timeout=20)
    assert process.returncode == 1 and len(fake.starts()) > 2


@pytest.mark.parametrize(
    ("sent", "continues", "code", "said"),
    [
        (signal.SIGUSR1, False, 75, "queued again"),
        (signal.SIGUSR1, True, 0, "the next job of the chain continues"),
        (signal.SIGTERM, False, 1, ""),
    ],
)  # fmt: skip
def test_a_signal_waits_for_the_ranks_and_decides_what_follows(
    sent: signal.Signals, continues: bool, code: int, said: str, fake: FakeSlurm, tmp_path: Path
) -> None:
    """The ranks end with code 1 half a second after the signal, as torchrun does."""
    stops = (
        "import time; stop = lambda *_: (time.sleep(.5), print('saved', flush=True), os._exit(1))"
    )
    body = f"{stops.replace(chr(39), chr(34))}; signal.signal({int(sent)}, stop); time.sleep(20)"
    job = replace(job_of(tmp_path), continues=continues)
    process = fake.start(training_script(job, Site(), python=fake.python(body)))
    deadline = time.monotonic() + 15
    while not fake.starts():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(sent)
    if sent == signal.SIGTERM:  # SLURM sends it to the processes of the step as well
        os.kill(_child(process.pid), signal.SIGTERM)
    printed, errors = process.communicate(timeout=20)
    assert "saved" in printed and said in printed, errors
    assert process.returncode == code
    assert len(fake.starts()) == 1, "no second attempt"
    asked = (fake.folder / "asked").read_text()
    assert ("requeue 7" in asked) == (code == 75)
    assert not (tmp_path / "run/launch/failed_nodes").exists()


def _child(parent: int) -> int:
    """The process that the job script waits for."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    assert len(children) == 1
    return int(children[0])


def test_a_node_that_cannot_run_true_is_lost_and_the_job_is_queued_again(
    fake: FakeSlurm, tmp_path: Path
) -> None:
    fake.program("srun", SRUN.replace('exec "$@"', '[ "$1" != true ] || exit 1\nexec "$@"'))
    job = replace(job_of(tmp_path), continues=True)
    process = fake.start(training_script(job, Site(), python=fake.python("sys.exit(3)")))
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 75 and "a node does not respond" in said and "queued again" in said
    assert len(fake.starts()) == 1, "the other attempts would fail as well"
    assert "requeue 7" in (fake.folder / "asked").read_text() and "SLURM refuses" not in said
    fake.scontrol("RUNNING", requeue="false")
    process = fake.start(training_script(job, Site(), python=fake.python("sys.exit(3)")))
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 75 and "SLURM refuses: python -m launch.slurm resume" in said


def test_a_cancelled_job_does_not_queue_itself_again_and_a_task_not_its_array(
    fake: FakeSlurm, tmp_path: Path
) -> None:
    fake.program("srun", SRUN.replace('exec "$@"', '[ "$1" != true ] || exit 1\nexec "$@"'))
    text = training_script(job_of(tmp_path), Site(), python=fake.python("sys.exit(3)"))
    fake.scontrol("CANCELLED")
    said, _ = fake.start(text).communicate(timeout=20)
    asked = (fake.folder / "asked").read_text()
    assert "not queued again" in said and "requeue 7" not in asked
    fake.scontrol("RUNNING")
    variables = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    said, _ = fake.start(text, **variables).communicate(timeout=20)
    assert "requeue 7_3\n" in (fake.folder / "asked").read_text(), "7 is the whole array"
