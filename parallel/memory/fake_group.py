"""A process group of ranks that do not exist: torch's `fake` backend."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_group(n_ranks: int) -> Iterator[None]:
    """Context with a default group of `n_ranks`, in which this rank is the first and nothing is
    sent.

    Raises ValueError if a process group is running.
    """
    hook = sys.excepthook  # torch's hook for ranks prints one before every error
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook
