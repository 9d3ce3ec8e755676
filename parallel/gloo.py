"""Gloo's groups and a reduce-scatter for them.

Every group has one worker thread, because torch's default of two corrupts the heap. All groups of a
process share the thread that moves their bytes, because each such thread wakes up 100 times a
second.

torch 2.13 starts two threads for every gloo group. When one of them has finished an operation it
writes the operation's name into a string of the group (`lastCompletedWorkName`), without a lock. Up
to 15 characters are in the string itself; a longer name is allocated, and two threads that replace
it at the same time both free the old one. `ALLGATHER_COALESCED`, the name of every all-gather of a
DTensor, has 19: one process with 16 of them running crashes within seconds, a training rarely and
anywhere in malloc. With one thread no string is shared. The operations of a group then run one
after another, in the order in which all its ranks start them anyway.
"""

import os
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

SPAN = "gloo reduce-scatter over "
"""Name of a reduce-scatter in a profile, followed by the number of ranks."""


@cache
def one_thread_per_group() -> None:
    """Create one worker thread for every gloo group that torch creates from now on, and one thread
    of communication for all of them.

    torch passes no options to gloo, so this replaces the constructor of its class.
    """
    gloo: Any = dist.ProcessGroupGloo
    made = gloo.__init__

    def init(self: Any, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "")  # as torch reads it
        options = gloo._Options()
        options._threads, options._timeout = 1, timeout
        options._devices = [_device(name) for name in interfaces.split(",")]
        made(self, store, rank, size, options)

    gloo.__init__ = init


@cache
def _device(interface: str) -> Any:
    """The device of a network interface, or of this host's address if it is ""."""
    gloo: Any = dist.ProcessGroupGloo
    return gloo.create_device(interface=interface) if interface else gloo.create_default_device()


class AllToAllReduceScatter:
    """A reduce-scatter that sends every element once: each rank receives its part of all ranks'
    inputs, and adds them up. Gloo's own computes an all-reduce of a copy of the input, which sends
    twice as much.

    The interface is that of FSDP2's `set_custom_reduce_scatter`.
    """

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any,
        async_op: bool = False,
    ) -> None:  # fmt: skip
        """FSDP2 passes ReduceOp.SUM (`parallel.apply`) and waits on CPUs."""
        assert op == dist.ReduceOp.SUM and not async_op
        with record_function(f"{SPAN}{group.size()}"):
            received = torch.empty_like(input_tensor)
            dist.all_to_all_single(received, input_tensor, group=group)
            torch.sum(received.view(group.size(), -1), 0, out=output_tensor)
