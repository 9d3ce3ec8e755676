"""`python -m launch.kubernetes FILE.toml --nodes N --site FILE [--section.key=value ...]`.

Checks the experiment for the nodes as `python -m launch.slurm` does, and prints a manifest of a
JobSet (https://jobset.sigs.k8s.io, API v1alpha2) that trains it, with torchrun in one pod per node.

    python -m launch.kubernetes configs/demo.toml --nodes 2 --site site.toml | kubectl apply -f -

Every string is quoted for YAML, and `$` for Kubernetes, which would replace `$(NAME)`.
"""

import re
import shlex
import sys
from pathlib import Path, PurePosixPath

from configs.command_line import CommandParser
from configs.errors import UserError
from configs.paths import is_url
from configs.rules import shown
from launch.experiment import check_experiment
from launch.options import chosen_site, counts, parsed
from launch.render import CHECKOUT, template, torchrun_options, variables
from launch.site import KubernetesSite, Site, SlurmSite

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
"""With the suffix of a pod it has to be a DNS label of at most 63 characters."""


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    try:
        print(manifest(arguments), end="")
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def manifest(arguments: list[str]) -> str:
    """The manifest of a command line. Raises UserError, one line."""
    parser = CommandParser(
        prog="python -m launch.kubernetes", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("file", help="experiment (TOML)")
    parser.add_argument("--nodes", required=True, help="pods, each with all GPUs of its node")
    parser.add_argument("--site", type=Path, help="site file (TOML); default: $PHALANX_SITE")
    parser.add_argument("--name", default="", help="of the JobSet; default: of the run's folder")
    options, overrides = parsed(parser, arguments)
    site = chosen_site(options.site)
    _check_site(site)
    nodes = counts(options.nodes, 1)[0]
    checked = check_experiment(options.file, overrides, nodes * site.node.ranks_per_node, site)
    place = site.kubernetes
    config = checked.config
    folders = [("run.dir", config.run.dir), ("data.cache_dir", config.data.cache_dir)]
    if config.checkpoint.dir and not is_url(config.checkpoint.dir):
        folders.append(("checkpoint.dir", config.checkpoint.dir))
    for key, folder in folders:
        if not PurePosixPath(folder).is_relative_to(place.mount) or ".." in Path(folder).parts:
            raise UserError(
                f"{key} = {shown(folder)}: must be below kubernetes.mount = {place.mount}, the "
                "folder that all pods share and that outlives them"
            )
    name = options.name or _as_name(PurePosixPath(config.run.dir).name)
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--name {shown(name)}: must be 1 to 40 lower-case letters, digits and -, beginning "
            "with a letter"
        )
    words = [_file_in_pod(options.file, place), *overrides]
    return render(name, nodes, words, site, f"python -m launch.kubernetes {shlex.join(arguments)}")


def _check_site(site: Site) -> None:
    """Raise UserError for keys that are missing, or that have no effect on Kubernetes."""
    for key in ("image", "claim"):
        if not getattr(site.kubernetes, key):
            raise UserError(f"site file: kubernetes.{key}: needed for a manifest (--site FILE)")
    without_effect = {
        "slurm": site.slurm != SlurmSite(),
        "software.modules": bool(site.software.modules),
        "software.container": bool(site.software.container),
        "faults.exclude_after": site.faults.exclude_after != type(site.faults)().exclude_after,
    }
    for key, is_set in without_effect.items():
        if is_set:
            raise UserError(f"site file: {key}: has no effect on Kubernetes; leave it out")


def _as_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _file_in_pod(file: str, place: KubernetesSite) -> str:
    """The experiment's path as a pod finds it: in the checkout, or in the shared folder."""
    path = Path(file).resolve()
    if path.is_relative_to(CHECKOUT):
        return str(path.relative_to(CHECKOUT))
    if path.is_relative_to(place.mount):
        return str(path)
    raise UserError(
        f"{file}: pods have the checkout and {place.mount}; put the experiment into one of them"
    )


def render(name: str, nodes: int, words: list[str], site: Site, command: str) -> str:
    """The manifest of a checked job. words: arguments of `python -m train`. command: printed."""
    place, node = site.kubernetes, site.node
    environment = [
        *variables(site),
        ("PYTHONPATH", place.checkout),
        ("MASTER", f"{name}-node-0-0.{name}"),  # the first pod, in the JobSet's own subdomain
    ]
    limits = [(place.gpu_resource, node.gpus), ("cpu", node.cpus)]
    given = "".join(f"\n                  {key}: {count}" for key, count in limits if count)
    scratch = quoted(node.scratch)
    activate = site.software.activate
    python = f"{activate}/bin/python" if activate else "python"
    return template("jobset.yaml").substitute(
        command="".join(c if c.isprintable() else " " for c in command),
        name=name,
        namespace=place.namespace,
        restarts=site.faults.attempts - 1,
        nodes=nodes,
        ranks=node.ranks_per_node,
        grace_s=place.grace_s,
        image=quoted(place.image),
        checkout=quoted(place.checkout),
        mount=quoted(place.mount),
        claim=quoted(place.claim),
        environment="".join(
            f"\n              - {{name: {key}, value: {quoted(_literal(value))}}}"
            for key, value in environment
        ),
        resources=f"\n                limits:{given}" if given else " {}",
        scratch_mount=f"\n              - {{name: scratch, mountPath: {scratch}}}"
        if node.scratch
        else "",
        scratch_volume="\n            - name: scratch\n              emptyDir: {}"
        if node.scratch
        else "",
        torchrun_options=torchrun_options(site),
        arguments="".join(
            f"\n              - {quoted(_literal(word))}" for word in [python, *words]
        ),
    )


def _literal(text: str) -> str:
    """The text in a form that Kubernetes turns into it: `$$` is its notation of `$`."""
    return text.replace("$", "$$")


def quoted(text: str) -> str:
    """A string as a YAML scalar in double quotes, of printable ASCII characters only."""

    def escaped(character: str) -> str:
        code = ord(character)
        if character in '"\\':
            return "\\" + character
        if 0x20 <= code < 0x7F:
            return character
        return f"\\x{code:02x}" if code < 0x100 else f"\\U{code:08x}"

    return '"' + "".join(map(escaped, text)) + '"'


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
