"""`[parallel.dispatch]`: how tokens reach experts of other ranks. Used where `parallel.ep` > 1."""

from dataclasses import dataclass
from typing import Literal

from configs.errors import ConfigError
from configs.rules import between

Wire = Literal["compute", "fp8"]
"""Format of the rows that are sent: the compute dtype, or FP8 with an fp32 scale per 128 values."""


@dataclass(frozen=True, kw_only=True)
class DispatchConfig:
    kind: Literal["all_to_all", "sync_free", "hierarchical", "deepep"] = "all_to_all"
    """Dispatcher: how tokens are sent between the ranks of `ep` (a single rank sends nothing).
    `all_to_all`: exact, one row per token and expert. `sync_free`: the same into buffers of
    fixed size, without a copy to the host. `hierarchical`: a token is sent to each node once and
    distributed there. `deepep`: the DeepEP library (CUDA, bf16)."""
    chunks: int = 1
    """Chunks that a rank's tokens are split into: one is sent while experts compute another. With
    1, only shared experts overlap with communication. Expert weights that are sharded over ranks
    outside `ep` are gathered for every chunk."""
    dispatch_dtype: Wire = "compute"
    """Tokens that are sent to experts. `fp8` adds the rounding error of the quantization."""
    combine_dtype: Wire = "compute"
    """Expert outputs that are sent back. hierarchical: only between nodes."""
    combine_grad_dtype: Wire = "compute"
    """Backward: gradients of expert outputs that are sent to experts."""
    dispatch_grad_dtype: Wire = "compute"
    """Backward: gradients of tokens that are sent back. hierarchical: only between nodes."""
    node_size: int = 0
    """Consecutive ranks of `ep` that form one node, for hierarchical and for the statistics
    of bytes between nodes. 0: the ranks on the same host."""
    capacity_factor: float = 2.0
    """sync_free: buffer rows that a rank reserves for each other rank, as a multiple of the even
    share. With a factor of at least the number of `ep` ranks nothing can overflow."""
    on_overflow: Literal["redo", "stop"] = "redo"
    """sync_free, when rows of a step did not fit the buffer: repeat the step exactly, or stop the
    run with an error that names the layer."""

    def __post_init__(self) -> None:
        between(self, 1, 64, "chunks")
        between(self, 0, 2**16, "node_size")
        between(self, 0.01, 2**16, "capacity_factor")
        if self.kind == "deepep":
            wires = ("dispatch_dtype", "combine_dtype", "combine_grad_dtype", "dispatch_grad_dtype")
            quantised = [key for key in wires if getattr(self, key) != "compute"]
            if quantised:
                raise ConfigError(f'{quantised[0]} = "fp8": kind = deepep sends bf16 only')
            if self.chunks > 1:
                raise ConfigError(f"chunks = {self.chunks}: kind = deepep takes all tokens at once")


def check_nodes(dispatch: DispatchConfig, ep: int) -> None:
    """Raise ConfigError if `node_size` does not divide `ep` ranks into several nodes."""
    size = dispatch.node_size
    if dispatch.kind == "hierarchical" and ep > 1 and size and (ep % size or ep == size):
        fitting = [str(n) for n in range(1, ep) if ep % n == 0]
        raise ConfigError(
            f"parallel.dispatch.node_size = {size}: must divide parallel.ep = {ep} into several "
            f"nodes; use one of {', '.join(fitting)}"
        )
