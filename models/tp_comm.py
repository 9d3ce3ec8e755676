"""Communication of tensor parallelism: gathers tokens and sums partial results.

Ranks that divide the heads and feed-forward widths of a layer among them (tensor parallelism,
arXiv:1909.08053) hold different tokens between those layers (sequence parallelism,
arXiv:2205.05198): `gather` returns all tokens before a divided projection, `reduce_scatter` sums
the ranks' results and returns each rank its tokens. Without division, both do nothing.
"""

from torch import Tensor
from torch.distributed import ProcessGroup


class TPComm:
    """Default without tensor parallelism: nothing is divided."""

    group: ProcessGroup | None = None
    """The ranks that divide the layers, and the vocabulary."""

    place: int = 0
    """Index of this rank among them: it has the `place`-th share of the tokens."""

    def gather(self, x_tD: Tensor) -> Tensor:
        """All tokens `[T, D]` from this rank's share of them."""
        return x_tD

    def reduce_scatter(self, y_TD: Tensor) -> Tensor:
        """This rank's tokens `[t, D]` of the sum over ranks."""
        return y_TD

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, without a gradient."""
        return values
