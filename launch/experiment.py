"""Checks an experiment for a number of nodes by arithmetic, as a login node can."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.config_warnings import config_warnings
from configs.errors import ConfigError
from configs.loader import load
from configs.parallel_dims import ParallelDims, resolve
from configs.paths import local_path
from configs.schema import JobConfig
from launch.site import Site


@dataclass(frozen=True)
class Checked:
    """An experiment that fits the nodes."""

    config: JobConfig
    dims: ParallelDims
    folder: Path
    """`run.dir` as an absolute path: the job starts in the checkout, the user somewhere."""
    lines: tuple[str, ...]
    """What to print about it."""


def check_experiment(file: str, overrides: Sequence[str], ranks: int, site: Site) -> Checked:
    """Load the experiment and resolve its mesh for `ranks`. Raises ConfigError, one line."""
    config = load(file, overrides)
    dims = resolve(config, ranks)
    state = state_bytes_per_rank(config, dims)
    memory = site.node.gpu_memory_gb
    if memory is not None and not config.parallel.cpu_offload and state > memory * 1e9:
        raise ConfigError(
            f"{file}: weights, gradients and moments alone need {state / 1e9:,.1f} GB per rank on "
            f"{ranks} ranks, and a GPU (node.gpu = {site.node.gpu}) has {memory} GB; use more "
            "nodes, or parallel.cpu_offload = true"
        )
    shape = "  ".join(f"{axis} {size}" for axis, size, _ in dims.table() if size > 1)
    lines = [
        f"{ranks} ranks: {shape or 'one'}",
        f"weights, gradients and moments: about {state / 1e9:,.3g} GB per rank"
        + (f" of {memory} GB" if memory else "")
        + " (activations come in addition: python -m train FILE --check)",
        *config_warnings(config),
    ]
    return Checked(config, dims, local_path(config.run.dir).absolute(), tuple(lines))


def state_bytes_per_rank(config: JobConfig, dims: ParallelDims) -> float:
    """Bytes of fp32 weights, fp32 gradients and moments of a rank: a lower bound of its memory.

    `ModelConfig.n_parameters` leaves out vectors and biases; every parameter is sharded over
    `dp_shard x tp` ranks (experts over `efsdp x ep x etp`, the same number).
    """
    moments = 4 if config.precision.moments == "bf16" else 8
    return config.model.n_parameters * (8 + moments) / (dims.dp_shard * dims.tp)
