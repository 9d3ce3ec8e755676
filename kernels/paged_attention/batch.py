"""The requests of a step, as the kernels read them. B requests, P pages per row of the table."""

from typing import NamedTuple

from torch import Tensor


class PagedBatch(NamedTuple):
    """The requests of a step and their pages; tensors on the device of the cache."""

    page_tables: Tensor
    """int32 `[B, P]`: pages of each request in order of position. Entries for keys to which no
    query of the request attends are not read."""
    query_starts: Tensor
    """int32 `[B + 1]`: rows `query_starts[b]` to `query_starts[b + 1]` belong to request b."""
    key_lengths: Tensor
    """int32 `[B]`: keys of request b up to its last row. 0: the result of its rows is zero."""
    n_decodes: int
    """Number of requests, the first ones, with exactly one row."""
