"""`python -m launch.slurm FILE.toml --nodes N [options] [--section.key=value ...]`: train on SLURM.

    python -m launch.slurm configs/demo.toml --nodes 2 --site site.toml --dry-run
    python -m launch.slurm status runs/demo
    python -m launch.slurm sweep configs/demo.toml --set parallel.ep=1,2 --nodes 1,2
    python -m launch.slurm serve runs/demo/export --nodes 2 --run runs/serving

Checks the experiment for the nodes, writes RUN/launch/train.sbatch and submits it. `status`,
`logs`, `cancel` and `resume` take the run's folder. `sweep` submits one job array per number of
nodes, with a run in run.dir/NAME for every combination of values, and `results` prints their table.
`serve` starts engines of an export and a router in front of them.
"""

import os
import shlex
import sys
from pathlib import Path

from configs.command_line import CommandParser
from configs.errors import UserError
from launch import cluster, run_folder
from launch.experiment import check_experiment
from launch.options import counts, parsed, slurm_parser, slurm_site
from launch.render import Job, training_script
from launch.run_folder import LAUNCH, SERVE_SCRIPT
from launch.serving import read_serving_job, serving_script
from launch.submit import earlier_jobs, locked, read_run, record, submit_run, train_arguments
from launch.sweep import has_runs, own_checkpoints, results, variants

_VERBS = ("status", "logs", "cancel", "resume", "results")


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    try:
        if arguments and arguments[0] in _VERBS:
            return _on_run(arguments[0], arguments[1:])
        return _submit(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {UserError(f'{where}{error.strerror or error}')}", file=sys.stderr)
        return 2


def _submit(arguments: list[str], again: Path | None = None) -> int:
    """Submit what a command line describes: a run, a sweep or a serving job. again: folder of one
    that was submitted before."""
    if arguments and arguments[0] == "sweep":
        return sweep(arguments[1:], again)
    if arguments and arguments[0] == "serve":
        return serve(arguments[1:], again)
    return submit(arguments, again)


def submit(arguments: list[str], again: Path | None = None) -> int:
    """Check, render and submit one run."""
    run = read_run(arguments)
    _check_place(again, run.job.folder, "--run.dir")
    if run.is_dry_run:
        print(run.scripts()[-1], end="")
        return 0
    print(*run.lines, sep="\n")
    ids = submit_run(run)
    print(f"job {', '.join(ids)}")
    print(f"logs {run.job.logs}")
    return 0


def sweep(arguments: list[str], again: Path | None = None) -> int:
    """Check, render and submit all variants of an experiment: a job array per number of nodes."""
    parser = slurm_parser("python -m launch.slurm sweep", __doc__, "experiment (TOML)")
    parser.add_argument("--set", action="append", default=[], help="section.key=value,value,...")
    options, overrides = parsed(parser, arguments)
    site = slurm_site(options.site, vars(options))
    found = variants(options.set, counts(options.nodes, 100), overrides)
    base, rendered = Path(), list[tuple[Job, list[str]]]()
    for nodes in dict.fromkeys(variant.nodes for variant in found):
        runs = []
        for variant in (one for one in found if one.nodes == nodes):
            words = [*overrides, *variant.overrides]
            ranks = nodes * site.node.ranks_per_node
            checked = check_experiment(options.file, words, ranks, site)
            base = checked.folder
            words += own_checkpoints(checked.config, variant.name)
            runs.append(train_arguments(options.file, words, base / variant.name))
        job = Job(
            name=options.name or base.name, nodes=nodes, folder=base, runs=tuple(runs),
            command=f"python -m launch.slurm sweep {shlex.join(arguments)}", start_in=Path.cwd(),
            summary=("results", str(base)),
        )  # fmt: skip
        rendered.append((job, [variant.name for variant in found if variant.nodes == nodes]))
    _check_place(again, base, "--run.dir")
    scripts = [(job, names, training_script(job, site)) for job, names in rendered]
    if options.dry_run:
        print(*(text for *_, text in scripts), sep="\n", end="")
        return 0
    with locked(base):
        jobs = earlier_jobs(base)
        for job, names, text in scripts:
            path = job.logs / f"sweep-{job.nodes}.sbatch"
            run_folder.replace(path, text)
            jobs.append(cluster.sbatch(path))
            record(base, ["sweep", *arguments], jobs)
            print(f"job {jobs[-1]}, {job.nodes} nodes: {', '.join(names)}")
    print(f"logs {base / LAUNCH}; table: python -m launch.slurm results {base}")
    return 0


def serve(arguments: list[str], again: Path | None = None) -> int:
    """Check, render and submit a serving job."""
    job, site, is_dry_run = read_serving_job(arguments)
    _check_place(again, job.folder, "--run")
    text = serving_script(job, site)
    if is_dry_run:
        print(text, end="")
        return 0
    if not Path(job.arguments[0]).is_dir():
        raise UserError(f"{job.arguments[0]}: no such folder; name an export")
    with locked(job.folder):
        jobs = earlier_jobs(job.folder)
        script = job.logs / SERVE_SCRIPT
        run_folder.replace(script, text)
        number = cluster.sbatch(script)
        record(job.folder, ["serve", *arguments], [*jobs, number])
    print(
        f"{job.engines} engines of {job.nodes_per_engine} nodes, port {job.port} of the first node"
    )
    print(f"job {number}")
    print(f"logs {job.logs}")
    return 0


def _check_place(again: Path | None, folder: Path, option: str) -> None:
    """Raise UserError if a folder was moved after its submission, which names the old one."""
    if again is not None and again.resolve() != folder.resolve():
        raise UserError(
            f"{again}: was submitted as {folder}; move it back, or submit it with {option}={again}"
        )


def _on_run(verb: str, arguments: list[str]) -> int:
    parser = CommandParser(prog=f"python -m launch.slurm {verb}", allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder of the run")
    if verb == "logs":
        parser.add_argument("--lines", type=int, default=20, help="last lines of the newest log")
    options = parser.parse_args(arguments)
    run: Path = options.run.absolute()
    if verb == "status":
        _status(run)
    elif verb == "logs":
        _logs(run, options.lines)
    elif verb == "cancel":
        active = cluster.queue(run_folder.read_submission(run).jobs)
        for job in reversed(active):
            cluster.scancel(job)
        print(f"cancelled {', '.join(active)}" if active else "no job of this run is left")
    elif verb == "results":
        print(results(run), end="")
    else:
        submission = run_folder.read_submission(run)
        os.chdir(submission.folder)
        return _submit(submission.arguments, again=run)
    return 0


def _status(run: Path) -> None:
    has_jobs = (run / LAUNCH / run_folder.SUBMISSION).is_file()
    submission = run_folder.read_submission(run) if has_jobs else None
    kind = submission.arguments[0] if submission and submission.arguments else ""
    lines = {} if kind in ("serve", "sweep") else run_folder.status(run)
    if kind == "serve" and (run / LAUNCH / run_folder.ADDRESS).is_file():
        lines["router"] = (run / LAUNCH / run_folder.ADDRESS).read_text().strip()
    if submission is not None:
        jobs = submission.jobs
        try:
            states = cluster.queue(jobs)
            if jobs and jobs[-1] not in states and (how := cluster.ended(jobs[-1])[0]):
                states[jobs[-1]] = f"ended ({how})"
            lines["jobs"] = ", ".join(f"{job} {states.get(job, 'ended')}" for job in jobs[-5:])
        except UserError as error:
            lines["jobs"] = f"{', '.join(jobs[-5:])}; {error}"
    for name, value in lines.items():
        print(f"{name:<16}{value}")
    if kind == "sweep" and has_runs(run):
        print(results(run), end="")


def _logs(run: Path, lines: int) -> None:
    if lines < 1:
        raise UserError(f"--lines {lines}: must be at least 1")
    logs = run_folder.node_logs(run)
    if not logs:
        raise UserError(f"{run}: no log yet; python -m launch.slurm status {run} shows the job")
    print(*logs, sep="\n")
    print(f"--- last lines of {logs[-1].name}")
    print(*run_folder.tail(logs[-1], lines), sep="\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
