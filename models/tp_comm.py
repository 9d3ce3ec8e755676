"""The seam of tensor parallelism: how tokens reach divided weights, and partial sums come together.

Ranks that divide the heads and feed-forward widths of a layer among them (tensor parallelism,
arXiv:1909.08053) keep different tokens between those layers (sequence parallelism,
arXiv:2205.05198): `gather` brings all tokens before a divided projection, `reduce_scatter` sums
what the ranks made of them and leaves each its own tokens. With nothing divided, both do nothing.
"""

from torch import Tensor
from torch.distributed import ProcessGroup


class TPComm:
    """Nothing is divided."""

    group: ProcessGroup | None = None
    """The ranks that divide the layers, and the vocabulary."""

    place: int = 0
    """Which of these ranks this one is: it has the `place`-th share of the tokens."""

    def gather(self, x_tD: Tensor) -> Tensor:
        """All tokens `[T, D]` from this rank's share of them."""
        return x_tD

    def reduce_scatter(self, y_TD: Tensor) -> Tensor:
        """This rank's tokens `[t, D]` of the sum over ranks."""
        return y_TD

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, without a gradient."""
        return values
