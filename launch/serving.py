"""A serving job on SLURM: engines, each on whole nodes, and a router in front of them.

The router is `sglang_router` (PyPI: sglang-router), which has to be installed next to Phalanx on
the nodes. It runs on the first node, checks the engines' health and sends requests with a common
prefix to the same engine.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from launch.options import counts, parsed, slurm_parser, slurm_site
from launch.render import (
    CHECKOUT,
    SlurmJob,
    check_names,
    container,
    directives,
    interpreter,
    setup,
    template,
    torchrun_options,
)
from launch.site import Site

POLICIES = ("cache_aware", "power_of_two", "round_robin", "random")
_MOST_ENGINES = 512
_GRACE_S = 20
"""Time for running requests after SIGTERM: torchrun kills its workers after 30 s."""


@dataclass(frozen=True, kw_only=True)
class ServingJob(SlurmJob):
    """Engines and a router."""

    nodes_per_engine: int
    arguments: tuple[str, ...]
    """Arguments of `python -m serve`, without host and port."""
    port: int
    """Port of the router; engine i listens on the i-th after it."""
    policy: str

    @property
    def engines(self) -> int:
        return self.nodes // self.nodes_per_engine


def read_serving_job(arguments: list[str]) -> tuple[ServingJob, Site, bool]:
    """The job of a command line of `python -m launch.slurm serve`, its site, and whether to print
    it only. Raises UserError, one line."""
    parser = slurm_parser("python -m launch.slurm serve", __doc__, "folder of the export")
    parser.add_argument("--run", type=Path, required=True, help="folder of the script and the logs")
    parser.add_argument("--nodes-per-engine", default="1", help="nodes of each engine (default 1)")
    parser.add_argument("--tp", default="1", help="as of python -m serve")
    parser.add_argument("--ep", default="1", help="as of python -m serve")
    parser.add_argument("--port", type=int, default=8000, help="of the router (default 8000)")
    parser.add_argument("--policy", default=POLICIES[0], choices=POLICIES, help="of the router")
    options, more = parsed(parser, arguments)
    site = slurm_site(options.site, vars(options))
    nodes, each = (
        counts(options.nodes, 1)[0],
        counts(options.nodes_per_engine, 1, "--nodes-per-engine")[0],
    )
    if nodes % each or nodes // each > _MOST_ENGINES:
        raise UserError(
            f"--nodes {nodes}: must be a multiple of --nodes-per-engine {each}, for at most "
            f"{_MOST_ENGINES} engines"
        )
    tp, ep = (counts(getattr(options, name), 1, f"--{name}")[0] for name in ("tp", "ep"))
    _check_degrees(tp, ep, each * site.node.ranks_per_node)
    if not 1024 <= options.port <= 65535 - nodes // each:
        raise UserError(
            f"--port {options.port}: must lie between 1024 and {65535 - nodes // each}; the ports "
            "after it are those of the engines"
        )
    if wrong := [word for word in more if word.startswith(("--host=", "--grace="))]:
        raise UserError(f"{wrong[0]}: the job script sets this option; leave it out")
    run: Path = options.run.absolute()
    job = ServingJob(
        name=options.name or run.name, nodes=nodes, folder=run, start_in=Path.cwd(),
        command=f"python -m launch.slurm serve {shlex.join(arguments)}", nodes_per_engine=each,
        arguments=(options.file, f"--tp={tp}", f"--ep={ep}", f"--grace={_GRACE_S}", *more),
        port=options.port, policy=options.policy,
    )  # fmt: skip
    return job, site, options.dry_run


def _check_degrees(tp: int, ep: int, ranks: int) -> None:
    """Raise UserError unless an engine of so many ranks can have these degrees. The model's sizes
    are checked when the engine starts."""
    most, least = max(tp, ep), min(tp, ep)
    if ranks == tp * ep or (ranks == most and most % least == 0):
        return
    raise UserError(
        f"--tp {tp} --ep {ep}: an engine has {ranks} {'ranks' if ranks > 1 else 'rank'}; the "
        f"larger degree or the product of both must be {ranks}"
    )


def serving_script(job: ServingJob, site: Site, python: str = "", checkout: Path = CHECKOUT) -> str:
    """The text of the sbatch script. python: as of `launch.render.training_script`."""
    check_names(job.name, job.folder)
    return template("serve.sbatch").substitute(
        directives=directives(job, site),
        command=" ".join(job.command.split()),
        checkout=shlex.quote(str(checkout)),
        folder=shlex.quote(str(job.start_in)),
        setup=setup(site),
        logs=shlex.quote(str(job.logs)),
        arguments=shlex.join(job.arguments),
        container=container(site),
        python=interpreter(site, python),
        ranks=site.node.ranks_per_node,
        torchrun_options=torchrun_options(site),
        engines=job.engines,
        nodes_per_engine=job.nodes_per_engine,
        port=job.port,
        policy=job.policy,
        attempts=site.faults.attempts,
        signal_s=site.slurm.signal_s,
    )
