"""The site file: what a cluster needs in every job script, as TOML.

The text of a site file is not trusted: every value is checked here against the characters that its
place in a job script allows, and `launch.render` quotes everything that a shell reads.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from configs.errors import ConfigError, UserError
from configs.rules import between, shown
from configs.tree import build_section
from configs.values import read_toml

Gpu = Literal[
    "none", "A100-40GB", "A100-80GB", "H100-80GB", "H200-141GB", "B200-180GB", "MI300X-192GB",
    "MI355X-288GB",
]  # fmt: skip
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}")
_WORDS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,+-]{0,255}")
_NODES = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,\[\]-]{0,1023}")
_TIME = re.compile(r"(\d{1,3}-)?\d{1,2}(:[0-5]\d){2}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\0-\x1f\x7f]*")
_LINE = re.compile(r"[^\0-\x1f\x7f]+")
_ABSOLUTE = re.compile(r"/[^\0-\x1f\x7f]*")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./:@-]{0,511}")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_RESOURCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,61}/[a-z0-9][a-z0-9.-]{0,61}")
_RESERVED = re.compile(
    r"(SLURM_\w*|SBATCH_\w*|MASTER_(ADDR|PORT)|(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|BASH_\w+|LD_PRELOAD"
    r"|TORCHELASTIC_\w+)="
)


@dataclass(frozen=True, kw_only=True)
class SlurmSite:
    """Options of sbatch. A command-line option of the same name replaces each."""

    partition: str = ""
    """Partition, or several separated by commas. Empty: the default of the cluster."""
    account: str = ""
    """Account that is charged. Empty: the user's default."""
    qos: str = ""
    """Quality of service. Empty: the default."""
    time: str = "24:00:00"
    """Largest duration of a job: HH:MM:SS or D-HH:MM:SS."""
    exclude: str = ""
    """Nodes that no job may use, as `n7` or `n[1-3],n9`."""
    constraint: str = ""
    """Feature that nodes must have, as `h100`."""
    signal_s: int = 300
    """Seconds before the end of its time at which a job is signaled to save and stop. SLURM may
    send the signal up to a minute late."""

    def __post_init__(self) -> None:
        check(self, _WORDS, "letters, digits and _ . , + -", "partition")
        check(self, _WORD, "letters, digits and _ . + -", "account", "qos", "constraint")
        check(self, _TIME, "HH:MM:SS or D-HH:MM:SS", "time")
        check(self, _NODES, "names of nodes, as n7 or n[1-3],n9", "exclude")
        between(self, 10, 65535, "signal_s")
        if not self.time:
            raise ConfigError('time = "": must be HH:MM:SS or D-HH:MM:SS')
        if seconds(self.time) <= self.signal_s:
            raise ConfigError(
                f"signal_s = {self.signal_s}: the signal would come before the start of a job of "
                f"time = {self.time}; use fewer seconds, or a longer time"
            )


@dataclass(frozen=True, kw_only=True)
class NodeSite:
    """One node and the processes on it."""

    gpu: Gpu = "none"
    """GPU of the nodes; `none`: ranks compute on CPUs."""
    gpus: int = 0
    """GPUs per node that a job requests; 0 on CPU nodes."""
    ranks: int = 0
    """Ranks per node; 0: one per GPU, or one where there are none."""
    cpus: int = 0
    """CPU cores per node that a job requests; 0: the cluster's default."""
    threads: int = 0
    """Value of OMP_NUM_THREADS of a rank; 0: the cores divided by the ranks."""
    numa_binding: bool = False
    """Bind each rank to the NUMA node of its GPU (torchrun --numa-binding node)."""
    interface: str = ""
    """Network interface for NCCL's and gloo's connections, as `eth0`. Empty: they choose."""
    scratch: str = ""
    """Folder on the node's own disk, for temporary files (TMPDIR). Empty: the node's default."""

    def __post_init__(self) -> None:
        between(self, 0, 64, "gpus")
        between(self, 0, 1024, "ranks", "threads")
        between(self, 0, 4096, "cpus")
        check(self, _WORD, "letters, digits and _ . + -", "interface")
        check(self, _ABSOLUTE, "an absolute path in one line", "scratch")
        if (self.gpu == "none") != (self.gpus == 0):
            raise ConfigError(
                f"gpus = {self.gpus}: with gpu = {self.gpu} it must be "
                + ("0" if self.gpu == "none" else "at least 1")
            )
        if self.numa_binding and not self.gpus:
            raise ConfigError("numa_binding = true: binds ranks to GPUs, but gpus = 0")

    @property
    def ranks_per_node(self) -> int:
        return self.ranks or self.gpus or 1

    @property
    def threads_per_rank(self) -> int:
        """Value of OMP_NUM_THREADS; 0: not set."""
        return self.threads or (self.cpus // self.ranks_per_node if self.cpus else 0)

    @property
    def gpu_memory_gb(self) -> int | None:
        """Memory of a GPU in 10^9 bytes; None on CPU nodes."""
        return None if self.gpu == "none" else int(self.gpu.split("-")[1].removesuffix("GB"))


@dataclass(frozen=True, kw_only=True)
class SoftwareSite:
    """How a node gets Python and the libraries."""

    modules: tuple[str, ...] = ()
    """Environment modules to load, as ["cuda/12.8"]."""
    activate: str = ""
    """Virtual environment on a shared file system, an absolute path. Empty: the one that
    submits."""
    container: tuple[str, ...] = ()
    """Command and arguments before torchrun, as ["apptainer", "exec", "--nv", "image.sif"]."""
    environment: tuple[str, ...] = ()
    """Variables of all ranks, as ["NCCL_DEBUG=WARN"]."""

    def __post_init__(self) -> None:
        for module in self.modules:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_./+-]{0,127}", module):
                raise ConfigError(f"modules: {shown(module)}: must be a name such as cuda/12.8")
        check(self, _ABSOLUTE, "an absolute path in one line", "activate")
        for word in self.container:
            if not _LINE.fullmatch(word):
                raise ConfigError(f"container: {shown(word)}: must be one line of text")
        for variable in self.environment:
            if not _VARIABLE.fullmatch(variable):
                raise ConfigError(f"environment: {shown(variable)}: must be NAME=value, one line")
            if _RESERVED.match(variable):
                raise ConfigError(
                    f"environment: {shown(variable)}: SLURM, torchrun or the shell sets this "
                    "variable; leave it out"
                )


@dataclass(frozen=True, kw_only=True)
class KubernetesSite:
    """What `python -m launch.kubernetes` needs; without effect on SLURM, where it is refused."""

    image: str = ""
    """Container image with Python and the libraries."""
    namespace: str = "default"
    """Namespace of the JobSet."""
    claim: str = ""
    """PersistentVolumeClaim of a file system that all pods can write (ReadWriteMany)."""
    mount: str = "/shared"
    """Folder of that file system in the pods."""
    checkout: str = "/shared/phalanx"
    """Folder of the checkout in the pods."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name of the resource that the GPUs are."""
    grace_s: int = 300
    """Seconds that the ranks get to save after SIGTERM."""

    def __post_init__(self) -> None:
        check(self, _IMAGE, "a name of an image, as registry/name:tag", "image")
        check(self, _LABEL, "at most 63 lower-case letters, digits and -", "namespace", "claim")
        check(self, _ABSOLUTE, "an absolute path in one line", "mount", "checkout")
        check(self, _RESOURCE, "a resource of Kubernetes, as nvidia.com/gpu", "gpu_resource")
        for key in ("namespace", "mount", "checkout", "gpu_resource"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is empty: leave it out for its default")
        between(self, 30, 86400, "grace_s")


@dataclass(frozen=True, kw_only=True)
class FaultSite:
    """What a job does about failures."""

    attempts: int = 3
    """Starts of torchrun in one job before it ends with an error."""
    exclude_after: int = 2
    """Failures that begin on a node after which later submissions of the run exclude it."""

    def __post_init__(self) -> None:
        between(self, 1, 1000, "attempts", "exclude_after")


@dataclass(frozen=True, kw_only=True)
class Site:
    """All sections of a site file, each optional."""

    slurm: SlurmSite = field(default_factory=SlurmSite)
    node: NodeSite = field(default_factory=NodeSite)
    software: SoftwareSite = field(default_factory=SoftwareSite)
    faults: FaultSite = field(default_factory=FaultSite)
    kubernetes: KubernetesSite = field(default_factory=KubernetesSite)


def load_site(path: Path | None) -> Site:
    """The site of a file; the defaults without one. Raises ConfigError, one line."""
    if path is None:
        return Site()
    site: Site = build_section(Site, read_toml(path), str(path))
    return site


def with_ranks_per_node(site: Site, ranks: int) -> Site:
    """The site with fewer ranks per node, each with the threads that it would have among all. A job
    still requests the whole node. Raises UserError."""
    node = site.node
    if ranks > node.ranks_per_node:
        raise UserError(
            f"--ranks-per-node {ranks}: a node has {node.ranks_per_node} (node.ranks or node.gpus "
            "of the site file)"
        )
    return replace(site, node=replace(node, ranks=ranks, threads=node.threads_per_rank))


def check(section: object, pattern: re.Pattern[str], what: str, *keys: str) -> None:
    """Raise ConfigError if a key is neither empty nor of the pattern."""
    for key in keys:
        value = getattr(section, key)
        if value and not pattern.fullmatch(value):
            raise ConfigError(f"{key} = {shown(value)}: must be {what}")


def seconds(time: str) -> int:
    """Seconds of a duration in SLURM's notation D-HH:MM:SS."""
    days, _, clock = time.rpartition("-")
    hours, minutes, rest = map(int, clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest
