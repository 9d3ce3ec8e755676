"""The time that this rank spends in collectives, mostly waiting for other ranks.

On a CPU a collective returns when it is complete, so its duration contains the wait. On CUDA it
returns once it is in the queue of the device; only the exchange of control messages between hosts
waits there.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

_FUNCTIONS = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single",
    "reduce_scatter_tensor", "reduce_scatter_single", "barrier",
)  # fmt: skip
"""Functions of `torch.distributed` that FSDP2 and our modules call."""


class CollectiveTime:
    """Seconds in collectives since the start."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its duration added."""

        def run(*arguments: Any, **named: Any) -> Any:
            if torch.compiler.is_compiling():
                return function(*arguments, **named)
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - start

        return run


_TIME = CollectiveTime()
_wait = torch.ops._c10d_functional.wait_tensor


def wait_tensor(x: Tensor) -> Tensor:
    """The result of a functional collective, once it is complete."""
    if torch.compiler.is_compiling():
        waited: Tensor = _wait(x)
        return waited
    start = time.perf_counter()
    waited = _wait(x)
    _TIME.seconds += time.perf_counter() - start
    return waited


@contextmanager
def collective_time() -> Iterator[CollectiveTime]:
    """Measures the time in collectives of this process while the context is open."""
    with ExitStack() as stack:
        for name in _FUNCTIONS:
            function = getattr(dist, name, None)
            if function is not None:
                stack.enter_context(patch.object(dist, name, _TIME.timed(function)))
        yield _TIME
