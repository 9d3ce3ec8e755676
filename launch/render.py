"""Renders the job scripts from `launch/templates`.

`%{name}` in a template is replaced by text that is already quoted for the shell (`shlex.quote`).
Directives of sbatch have no reliable quoting: their values may hold only the characters that
`launch.site` and `check_names` allow.
"""

import re
import shlex
import string
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from configs.errors import UserError
from configs.rules import shown
from launch.site import Site

CHECKOUT = Path(__file__).resolve().parent.parent
_TEMPLATES = Path(__file__).resolve().parent / "templates"
_PATH = re.compile(r"/[A-Za-z0-9_./+@=,-]*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}")


class _Template(string.Template):
    delimiter = "%"
    # the base class compiles it
    pattern: ClassVar[Any] = r"""
    %(?:
      (?P<escaped>%)(?=\{) |
      (?P<named>(?!)) |
      \{(?P<braced>[a-z_]+)\} |
      (?P<invalid>(?!))
    )
    """  # `%` alone is text: patterns of SLURM and `date` use it


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """What every job script has."""

    name: str
    nodes: int
    folder: Path
    """Folder of the run (absolute), which has the script and the logs in `launch/`."""
    command: str
    """The command that rendered the script, for its reader."""
    start_in: Path
    """Folder that relative paths refer to."""
    exclude: tuple[str, ...] = ()
    """Nodes to avoid, in addition to the site's."""

    @property
    def logs(self) -> Path:
        return self.folder / "launch"


@dataclass(frozen=True, kw_only=True)
class Job(SlurmJob):
    """What one job script trains."""

    runs: tuple[tuple[str, ...], ...]
    """Arguments of `python -m train`: one tuple, or one per task of a job array."""
    continues: bool = False
    """Whether a later job of a chain continues after the end of time; otherwise the job is
    queued again."""
    summary: tuple[str, ...] = ()
    """Arguments of `python -m launch.slurm` that a task of an array runs at its end."""


def check_names(name: str, folder: Path) -> None:
    """Raise UserError for names that sbatch's directives could not hold."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"job name {shown(name)}: must begin with a letter or digit and have only letters, "
            "digits and _ . + -; give another with --name"
        )
    if not _PATH.fullmatch(str(folder)):
        raise UserError(
            f"run.dir = {shown(str(folder))}: SLURM's log file needs a path of letters, digits and "
            "_ . / + @ = , -"
        )


def training_script(job: Job, site: Site, python: str = "", checkout: Path = CHECKOUT) -> str:
    """The text of the sbatch script. python: interpreter of the nodes; default: the site's virtual
    environment, or the running one."""
    check_names(job.name, job.folder)
    later = '  echo "$(date +%FT%T) the next job of the chain continues"\n'
    return template("train.sbatch").substitute(
        directives=directives(job, site, array=len(job.runs)),
        command=" ".join(job.command.split()),
        checkout=shlex.quote(str(checkout)),
        folder=shlex.quote(str(job.start_in)),
        setup=setup(site),
        logs=shlex.quote(str(job.logs)) + ("/$SLURM_ARRAY_TASK_ID" if len(job.runs) > 1 else ""),
        arguments=_arguments(job),
        container=container(site),
        python=interpreter(site, python),
        ranks=site.node.ranks_per_node,
        torchrun_options=torchrun_options(site),
        signal_s=site.slurm.signal_s,
        attempts=site.faults.attempts,
        stop_code=0 if job.continues else 75,
        requeue=later if job.continues else "  requeue\n",
        at_end=f"{interpreter(site, python)} -m launch.slurm {shlex.join(job.summary)} "
        ">/dev/null || true"
        if job.summary
        else "",
    )


def directives(job: SlurmJob, site: Site, array: int = 1) -> str:
    """The lines of sbatch's options. array: tasks, 1 for a job that is no array."""
    node, slurm = site.node, site.slurm
    exclude = ",".join([*filter(None, [slurm.exclude]), *job.exclude])
    options = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": node.cpus or None,
        "gres": f"gpu:{node.gpus}" if node.gpus else None,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "exclude": exclude,
        "time": slurm.time,
        "signal": f"B:USR1@{slurm.signal_s}",
        "array": f"0-{array - 1}" if array > 1 else None,
        "output": job.logs / ("job-%A-%a.log" if array > 1 else "job-%j.log"),
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value]
    return "\n".join([*lines, "#SBATCH --requeue"])


def setup(site: Site) -> str:
    """The lines of a script that load modules and set variables."""
    lines = [f"module load {shlex.quote(module)}" for module in site.software.modules]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables(site)]
    return "\n".join(lines)


def variables(site: Site) -> list[tuple[str, str]]:
    """Names and values of the variables that the site file implies for every rank."""
    node = site.node
    threads = node.threads_per_rank
    found = [("OMP_NUM_THREADS", str(threads))] if threads else []
    if node.interface:
        found += [(f"{name}_SOCKET_IFNAME", node.interface) for name in ("NCCL", "GLOO")]
    if node.scratch:
        found.append(("TMPDIR", node.scratch))
    for variable in site.software.environment:
        name, _, value = variable.partition("=")
        found.append((name, value))
    return found


def interpreter(site: Site, python: str = "") -> str:
    """Python on the nodes, quoted: the given one, the site's, or the running one."""
    activated = f"{site.software.activate}/bin/python" if site.software.activate else ""
    return shlex.quote(python or activated or sys.executable)


def container(site: Site) -> str:
    """The words before Python, quoted, with a space after each."""
    return "".join(shlex.quote(word) + " " for word in site.software.container)


def torchrun_options(site: Site) -> str:
    return "--numa-binding node " if site.node.numa_binding else ""


def _arguments(job: Job) -> str:
    if len(job.runs) == 1:
        return f"ARGUMENTS=({shlex.join(job.runs[0])})"
    cases = [f"  {i}) ARGUMENTS=({shlex.join(run)}) ;;" for i, run in enumerate(job.runs)]
    return "\n".join(['case "$SLURM_ARRAY_TASK_ID" in', *cases, "  *) exit 1 ;;", "esac"])


def template(name: str) -> string.Template:
    """A template of `launch/templates`."""
    return _Template((_TEMPLATES / name).read_text())
