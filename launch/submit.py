"""Reads, checks and submits one run, as `python -m launch.slurm FILE.toml --nodes N` describes it.

A submission locks the run's folder, so that of two at the same time one is refused, and every job
is recorded before the next is submitted.
"""

import fcntl
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from configs.errors import UserError
from launch import cluster, run_folder
from launch.experiment import Checked, check_experiment
from launch.options import counts, parsed, slurm_parser, slurm_site
from launch.render import Job, training_script
from launch.run_folder import LAUNCH, SCRIPT, Submission
from launch.site import Site, with_ranks_per_node

DESCRIPTION = """\
Checks the experiment for the nodes, writes RUN/launch/train.sbatch and submits it. Further
commands: sweep, serve, status, logs, cancel, resume, results (docs/launch.md)."""
_FILE = (
    "experiment (TOML), or sweep, serve, status, logs, cancel, resume and what each of them needs"
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that has been checked and can be submitted."""

    job: Job
    site: Site
    checked: Checked
    arguments: list[str]
    """Words of the command line, which `resume` repeats."""
    jobs: int
    """Jobs of the chain."""
    is_dry_run: bool

    @property
    def lines(self) -> list[str]:
        """What to print about it."""
        excluded = f"excluded after repeated failures: {', '.join(self.job.exclude)}"
        return [*self.checked.lines, *[excluded] * bool(self.job.exclude)]

    def scripts(self) -> list[str]:
        """The job scripts of the chain, different ones only: all but the last are the same."""
        last = training_script(self.job, self.site)
        if self.jobs == 1:
            return [last]
        return [training_script(replace(self.job, continues=True), self.site), last]


def read_run(arguments: list[str]) -> Run:
    """The run of a command line. Raises UserError, one line."""
    parser = slurm_parser("python -m launch.slurm", DESCRIPTION, _FILE)
    parser.add_argument("--jobs", type=int, default=1, help="jobs, each after the one before")
    parser.add_argument(
        "--ranks-per-node", help="fewer than the site file's; each keeps its threads"
    )
    options, overrides = parsed(parser, arguments)
    nodes = counts(options.nodes, 1)[0]
    if not 1 <= options.jobs <= 1000:
        raise UserError(f"--jobs {options.jobs}: must lie between 1 and 1000")
    site = slurm_site(options.site, vars(options))
    if options.ranks_per_node is not None:
        ranks = counts(options.ranks_per_node, 1, "--ranks-per-node")[0]
        site = with_ranks_per_node(site, ranks)
    checked = check_experiment(options.file, overrides, nodes * site.node.ranks_per_node, site)
    job = Job(
        name=options.name or checked.folder.name,
        nodes=nodes,
        folder=checked.folder,
        runs=(train_arguments(options.file, overrides, checked.folder),),
        command=f"python -m launch.slurm {shlex.join(arguments)}",
        start_in=Path.cwd(),
        exclude=run_folder.failed_nodes(checked.folder, site.faults.exclude_after),
    )
    run = Run(
        job=job, site=site, checked=checked, arguments=arguments, jobs=options.jobs,
        is_dry_run=options.dry_run,
    )  # fmt: skip
    run.scripts()  # refuses names that no job script can hold
    return run


def submit_run(run: Run, after: str | None = None) -> list[str]:
    """Write the scripts and submit them, each job after the one before; returns the ids. after: job
    that has to end before the first, with any result. Raises UserError."""
    folder, ids = run.job.folder, list[str]()
    with locked(folder):
        earlier = earlier_jobs(folder)
        first, *_, last = [*run.scripts()] * 2
        for i in range(run.jobs):
            is_last = i == run.jobs - 1
            script = run.job.logs / (SCRIPT if is_last else f"chained.{SCRIPT}")
            run_folder.replace(script, last if is_last else first)
            try:
                ids.append(cluster.sbatch(script, after=ids[-1] if ids else after))
            except UserError as error:
                if ids:
                    raise UserError(f"job {', '.join(ids)} submitted; {error}") from None
                raise
            record(folder, run.arguments, [*earlier, *ids])
    return ids


def train_arguments(file: str, overrides: list[str], folder: Path) -> tuple[str, ...]:
    """Arguments of the trainer, which starts in the folder of this command."""
    kept = [word for word in overrides if not word.startswith("--run.dir=")]
    return (file, *kept, f"--run.dir={folder}")


def record(folder: Path, arguments: list[str], jobs: list[str]) -> None:
    """Replace the record of the last submission of a folder."""
    submission = Submission(arguments=arguments, folder=str(Path.cwd()), jobs=jobs)
    run_folder.write_submission(folder, submission)


def earlier_jobs(folder: Path) -> list[str]:
    """Ids of the jobs submitted for a folder so far, all of which have ended. Raises UserError if
    one has not."""
    if not (folder / LAUNCH / run_folder.SUBMISSION).is_file():
        return []
    jobs = run_folder.read_submission(folder).jobs
    if active := cluster.queue(jobs):
        raise UserError(
            f"{folder}: job {', '.join(active)} of this run is still queued or running; cancel it "
            "first, with python -m launch.slurm cancel RUN"
        )
    return jobs


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other submissions away from a run. Raises UserError if one is under way."""
    path = folder / LAUNCH / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"{folder}: another submission of this run is under way") from None
    except OSError:
        pass  # some network file systems have no locks
    try:
        yield
    finally:
        os.close(handle)
