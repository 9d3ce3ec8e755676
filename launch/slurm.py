"""`python -m launch.slurm FILE.toml --nodes N [options] [--section.key=value ...]`: train on SLURM.

    python -m launch.slurm configs/demo.toml --nodes 2 --site site.toml --dry-run
    python -m launch.slurm status runs/demo
    python -m launch.slurm sweep configs/demo.toml --set parallel.ep=1,2 --nodes 1,2

Checks the experiment for the nodes, writes RUN/launch/train.sbatch and submits it. `status`,
`logs`, `cancel` and `resume` take the run's folder. `sweep` submits one job array per number of
nodes, with a run in run.dir/NAME for every combination of values, and `results` prints their table.
"""

import argparse
import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from configs.command_line import CommandParser
from configs.errors import UserError
from launch import cluster, run_folder
from launch.experiment import Checked, check_experiment
from launch.render import Job, training_script
from launch.run_folder import LAUNCH, SCRIPT, Submission
from launch.site import Site, load_site
from launch.sweep import results, variants

_VERBS = ("status", "logs", "cancel", "resume", "results")
_SITE_OPTIONS = ("--partition", "--account", "--qos", "--time", "--constraint", "--exclude")


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    try:
        if arguments and arguments[0] == "sweep":
            return sweep(arguments[1:])
        if arguments and arguments[0] in _VERBS:
            return _on_run(arguments[0], arguments[1:])
        return submit(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {UserError(f'{where}{error.strerror or error}')}", file=sys.stderr)
        return 2


def _parser(prog: str = "python -m launch.slurm") -> CommandParser:
    parser = CommandParser(prog=prog, description=__doc__, allow_abbrev=False)
    parser.add_argument("file", help="experiment (TOML), or status, logs, cancel, resume and a run")
    parser.add_argument("--nodes", required=True, help="nodes of the job; of a sweep, several")
    parser.add_argument("--site", type=Path, help="site file (TOML); default: $PHALANX_SITE")
    parser.add_argument("--name", default="", help="job name; default: name of the run's folder")
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    for option in _SITE_OPTIONS:
        parser.add_argument(option, help=f"replaces slurm.{option[2:]} of the site file")
    return parser


def submit(arguments: list[str]) -> int:
    """Check, render and submit one run."""
    parser = _parser()
    parser.add_argument("--jobs", type=int, default=1, help="jobs, each after the one before")
    options, overrides = _parsed(parser, arguments)
    options.nodes = _counts(options.nodes, 1)[0]
    if not 1 <= options.jobs <= 1000:
        raise UserError(f"--jobs {options.jobs}: must lie between 1 and 1000")
    site = _site(options.site, vars(options))
    ranks = options.nodes * site.node.ranks_per_node
    checked = check_experiment(options.file, overrides, ranks, site)
    job = Job(
        name=options.name or checked.folder.name,
        nodes=options.nodes,
        folder=checked.folder,
        runs=(_train_arguments(options.file, overrides, checked),),
        command=f"python -m launch.slurm {shlex.join(arguments)}",
        start_in=Path.cwd(),
        exclude=run_folder.failed_nodes(checked.folder, site.faults.exclude_after),
    )
    if options.dry_run:
        print(training_script(replace(job, continues=options.jobs > 1), site), end="")
        return 0
    print(*checked.lines, sep="\n")
    if job.exclude:
        print(f"excluded after repeated failures: {', '.join(job.exclude)}")
    ids = _submit_chain(job, site, options.jobs)
    earlier = _earlier(checked.folder)
    run_folder.write_submission(
        checked.folder,
        Submission(arguments=arguments, folder=str(Path.cwd()), jobs=[*earlier, *ids]),
    )
    print(f"job {', '.join(ids)}")
    print(f"logs {job.logs}")
    return 0


def sweep(arguments: list[str]) -> int:
    """Check, render and submit all variants of an experiment: a job array per number of nodes."""
    parser = _parser("python -m launch.slurm sweep")
    parser.add_argument("--set", action="append", default=[], help="section.key=value,value,...")
    options, overrides = _parsed(parser, arguments)
    site = _site(options.site, vars(options))
    found = variants(options.set, _counts(options.nodes, 100))
    base, rendered = Path(), list[tuple[Job, list[str]]]()
    for nodes in dict.fromkeys(variant.nodes for variant in found):
        runs = []
        for variant in (one for one in found if one.nodes == nodes):
            words = [*overrides, *variant.overrides]
            ranks = nodes * site.node.ranks_per_node
            checked = check_experiment(options.file, words, ranks, site)
            base = checked.folder
            checked = replace(checked, folder=base / variant.name)
            runs.append(_train_arguments(options.file, words, checked))
        job = Job(
            name=options.name or base.name, nodes=nodes, folder=base, runs=tuple(runs),
            command=f"python -m launch.slurm sweep {shlex.join(arguments)}", start_in=Path.cwd(),
            summary=("results", str(base)),
        )  # fmt: skip
        rendered.append((job, [variant.name for variant in found if variant.nodes == nodes]))
    scripts = [(job, names, training_script(job, site)) for job, names in rendered]
    if options.dry_run:
        print(*(text for *_, text in scripts), sep="\n", end="")
        return 0
    ids = []
    for job, names, text in scripts:
        path = job.logs / f"sweep-{job.nodes}.sbatch"
        run_folder.replace(path, text)
        ids.append(cluster.sbatch(path))
        print(f"job {ids[-1]}, {job.nodes} nodes: {', '.join(names)}")
    submission = Submission(arguments=["sweep", *arguments], folder=str(Path.cwd()), jobs=ids)
    run_folder.write_submission(base, submission)
    print(f"logs {base / LAUNCH}; table: python -m launch.slurm results {base}")
    return 0


def _parsed(parser: CommandParser, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options and overrides. Raises UserError for words that are neither."""
    options, overrides = parser.parse_known_args(arguments)
    if wrong := [word for word in overrides if not (word.startswith("--") and "=" in word)]:
        raise UserError(f"{wrong[0]!r}: neither an option nor --section.key=value")
    return options, overrides


def _counts(text: str, most: int) -> list[int]:
    """The numbers of nodes in `N` or `N,N,...`. Raises UserError."""
    words = text.split(",")
    if len(words) > most or not all(re.fullmatch(r"[1-9][0-9]{0,4}", word) for word in words):
        several = ", or several separated by commas" if most > 1 else ""
        raise UserError(f"--nodes {text}: must be a number from 1 to 99999{several}")
    return [int(word) for word in words]


def _site(path: Path | None, options: dict[str, object]) -> Site:
    chosen = path or (Path(os.environ["PHALANX_SITE"]) if os.environ.get("PHALANX_SITE") else None)
    site = load_site(chosen)
    keys = [option[2:] for option in _SITE_OPTIONS]
    given = {key: options[key] for key in keys if options[key] is not None}
    return replace(site, slurm=replace(site.slurm, **given))  # type: ignore[arg-type]


def _train_arguments(file: str, overrides: list[str], checked: Checked) -> tuple[str, ...]:
    """Arguments of the trainer, which starts in the folder of this command."""
    kept = [word for word in overrides if not word.startswith("--run.dir=")]
    return (file, *kept, f"--run.dir={checked.folder}")


def _submit_chain(job: Job, site: Site, jobs: int) -> list[str]:
    """Write the scripts and submit them, each after the one before; returns the ids."""
    ids: list[str] = []
    for i in range(jobs):
        is_last = i == jobs - 1
        script = job.logs / (SCRIPT if is_last else f"chained.{SCRIPT}")
        run_folder.replace(script, training_script(replace(job, continues=not is_last), site))
        ids.append(cluster.sbatch(script, after=ids[-1] if ids else None))
    return ids


def _earlier(folder: Path) -> list[str]:
    if not (folder / LAUNCH / run_folder.SUBMISSION).is_file():
        return []
    jobs = run_folder.read_submission(folder).jobs
    if active := cluster.queue(jobs):
        raise UserError(
            f"{folder}: job {', '.join(active)} of this run is still queued or running; cancel it "
            "first, with python -m launch.slurm cancel RUN"
        )
    return jobs


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
        return main(submission.arguments)
    return 0


def _status(run: Path) -> None:
    lines = run_folder.status(run)
    if (run / LAUNCH / run_folder.SUBMISSION).is_file():
        jobs = run_folder.read_submission(run).jobs
        try:
            states = cluster.queue(jobs)
            lines["jobs"] = ", ".join(f"{job} {states.get(job, 'ended')}" for job in jobs[-5:])
        except UserError as error:
            lines["jobs"] = f"{', '.join(jobs[-5:])}; {error}"
    for name, value in lines.items():
        print(f"{name:<16}{value}")


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
