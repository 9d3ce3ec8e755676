"""A real SLURM cluster of two nodes on this machine: slurmctld, and one slurmd per node.

Needs root and the packages slurm-wlm and munge. Keys and state belong to one folder and all ports
are free ones, so other clusters of the machine are not touched.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.runs import free_port

NODES = ("n1", "n2")
_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmctldPort={ports[0]}
FirstJobId={first_job}
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmdSpoolDir={root}/spool-%n
StateSaveLocation={root}/state
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
KillWait=30
SlurmdTimeout=30
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
_NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 Sockets=1 "
    "CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN"
)


def missing() -> str:
    """Why no cluster can be started here; empty if one can."""
    programs = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
    absent = [name for name in programs if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge"
    return "" if os.getuid() == 0 else "slurmd needs root"


def is_skipped() -> bool:
    """Whether tests are skipped: not where REQUIRE_SLURM is set. There, what is missing is an
    error."""
    return bool(missing()) and "REQUIRE_SLURM" not in os.environ


class SlurmCluster:
    """The running cluster; its commands find it through SLURM_CONF."""

    def __init__(self, root: Path) -> None:
        assert not missing(), missing()
        self.root = root
        self.env = os.environ | {"SLURM_CONF": str(root / "slurm.conf")}
        host = socket.gethostname().split(".")[0]
        for name in ("state", "spool-n1", "spool-n2"):
            (root / name).mkdir()
        ports = [free_port() for _ in range(1 + len(NODES))]
        nodes = "\n".join(
            _NODE.format(name=name, host=host, port=port)
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        # torchrun's ports follow from the job's number: those of another cluster are others
        first_job = 1 + ports[0] % 30000
        text = _CONF.format(root=root, host=host, ports=ports, nodes=nodes, first_job=first_job)
        (root / "slurm.conf").write_text(text)
        key = root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log"}
        munge = [f"--{option}={root / f'munge.{end}'}" for option, end in files.items()]
        self.run("munged", "--force", *munge, f"--seed-file={root / 'munge.seed'}")
        self.run("slurmctld", "-c")
        for node in NODES:
            self.start_node(node)
        self.wait(lambda: self.idle() == 2, "two idle nodes")

    def run(self, *words: str, check: bool = True) -> str:
        """The output of one of SLURM's programs."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def idle(self) -> int:
        return self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split().count("idle")

    def start_node(self, node: str) -> None:
        self.run("slurmd", "-N", node, "-f", str(self.root / "slurm.conf"))

    def kill_node(self, node: str, *, is_noticed: bool = True) -> None:
        """Kill slurmd and every process of the node at once, as a power failure does. is_noticed:
        whether slurmctld knows it at once, or only after its SlurmdTimeout."""
        daemons = {int((self.root / f"slurmd-{node}.pid").read_text())}
        processes = set[int]()
        wanted = (f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.root}".encode())
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                found = (folder / "environ").read_bytes()
                if all(word in found for word in wanted):
                    processes.add(int(folder.name))
                    parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                    if "slurmstepd" in Path(f"/proc/{parent}/comm").read_text():
                        daemons.add(parent)
            except OSError:
                continue
        for process in [*daemons, *processes]:  # daemons first: they would report how a job ended
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if is_noticed:
            self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=killed")

    def start_now(self, job: str) -> None:
        """A job that SLURM has queued again waits two minutes: start it at once, unless it has
        started, as a job that was queued again by its own script may have."""
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)

    def state(self, job: str) -> str:
        return self.run("squeue", "-h", "-j", job, "-o", "%T", check=False).strip()

    def wait(self, reached: Callable[[], bool], what: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, f"no {what} within {seconds:.0f} s"
            time.sleep(0.3)

    def wait_for(self, read: Callable[[], list[str]], lines: int, what: str) -> list[str]:
        """Wait until something has so many lines; returns them."""
        self.wait(lambda: len(read()) == lines, f"{lines} {what}")
        return read()

    def cancel_all(self) -> None:
        """Cancel all jobs, and wait until their processes have ended."""
        self.run("scancel", "--me", check=False)
        self.wait(lambda: not self.run("squeue", "-h", check=False), "empty queue", 60)

    def stop(self) -> None:
        """Cancel all jobs and end the daemons."""
        try:
            self.cancel_all()
        finally:
            for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "munge"):
                pid = self.root / f"{name}.pid"
                if pid.is_file():
                    try:
                        os.kill(int(pid.read_text()), signal.SIGTERM)
                    except ProcessLookupError:
                        continue
