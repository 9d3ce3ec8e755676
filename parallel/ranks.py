"""Rank, device and process group of this process.

The code path is the same for one process and many: without torchrun a one-rank group is created
from a `HashStore`, so FSDP2 and the collectives run the same code everywhere. On CUDA the default
group has two backends, NCCL for tensors on the device and gloo for those on the host, so that
control messages (stop flags, JSON) never wait for the device; all other groups have NCCL alone.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.errors import UserError
from kernels.device import missing_triton
from parallel.allocator import keep_freed_memory
from parallel.gloo import one_thread_per_group
from parallel.launch_environment import read_launch_environment
from parallel.rank_monitor import RankMonitor
from parallel.rendezvous import join, meet

_ROLL_CALLS: list[RankMonitor] = []
"""The monitor of this process, from `start_ranks` to `stop_ranks`."""


def outcome(function: Callable[[], Any]) -> dict[str, Any]:
    """The result of a function, or the line of its UserError or OSError, for other ranks."""
    try:
        return {"result": function()}
    except UserError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": one_line(error)}


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, and the number of ranks."""

    rank: int
    world: int
    device: torch.device
    store: dist.Store
    rank_monitor: RankMonitor | None = None
    """Finds ranks that no longer answer; None for a single rank."""
    _decisions: "count[int]" = field(default_factory=count)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def on_first(self, function: Callable[[], Any]) -> Any:
        """Run `function` on rank 0; all ranks get its result (JSON), or its error as UserError.

        The others wait on the store, without a limit: preparing a corpus may take hours, and a
        collective would time out. Use it for code that reads or writes shared files and decides
        what all ranks do next, since ranks on other hosts may see the files later.
        """
        key = f"decision/{next(self._decisions)}"
        if self.is_first:
            self.store.set(key, json.dumps(outcome(function)))
        else:
            self.store.wait([key], timedelta(days=30))
        answer = json.loads(self.store.get(key))
        if "error" in answer:
            raise UserError(answer["error"])
        return answer["result"]

    def on_every(self, function: Callable[[], Any]) -> Any:
        """Run `function` on every rank and return the local result. If it fails on one, all ranks
        raise the error of the first such rank, so that no rank waits for it."""
        result, failed = None, ""
        try:
            result = function()
        except UserError as error:
            failed = str(error)
        except OSError as error:
            failed = one_line(error)
        for rank, text in enumerate(gather_json(failed)):
            if text:
                raise UserError(f"rank {rank}: {text}" if rank else text)
        return result


def one_line(error: OSError) -> str:
    """The system's error in one line, with its file if that is known."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def start_ranks(threads: int = 0, use_cuda: bool = True) -> Ranks:
    """Join the process group that the launcher describes, or create a group of one.

    threads: CPU threads of this process; 0: OMP_NUM_THREADS if the user set it, else the available
    cores, divided among the ranks of this host. use_cuda: if there are CUDA devices, use the one of
    this rank's number on its host. Raises UserError if the launcher's variables are
    invalid, or the ranks do not connect to each other.
    """
    placement = read_launch_environment()
    # torchrun sets OMP_NUM_THREADS to 1 if the user did not, so 1 has no meaning there
    given = os.environ.get("OMP_NUM_THREADS", "")
    if threads or not given or (placement.is_launched and given == "1"):
        torch.set_num_threads(threads or max(usable_cores() // placement.local_world, 1))
    device, backend = torch.device("cpu"), "gloo"
    if use_cuda and torch.cuda.is_available():
        if placement.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK = {placement.local_rank}: this host has "
                f"{torch.cuda.device_count()} CUDA devices, one for each of its ranks"
            )
        if problem := missing_triton():
            raise UserError(problem)
        device, backend = torch.device("cuda", placement.local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    one_thread_per_group()
    store = meet(placement)
    join(store, backend, placement, device if device.type == "cuda" else None)
    if placement.world == 1:
        return Ranks(0, 1, device, store)
    _ROLL_CALLS.append(RankMonitor(store, placement))
    return Ranks(placement.rank, placement.world, device, store, _ROLL_CALLS[-1])


def usable_cores() -> int:
    """Cores available to this process, which may be fewer than the machine has (batch systems)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def wait_for_all() -> None:
    """Return once all ranks have called it."""
    dist.barrier()


def stop_ranks() -> None:
    """Leave the process group together; a gloo rank that exits early can abort its peers."""
    while _ROLL_CALLS:
        _ROLL_CALLS.pop().stop()  # before the store ends with its process
    dist.barrier()
    dist.destroy_process_group()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in place; the backend follows the tensor's device."""
    dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on at least one rank. A host-side exchange that uses no device."""
    tensor = torch.tensor([int(flag)])
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return bool(tensor.item())


def gather_json(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank. JSON bytes, never pickle."""
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([payload.numel()]))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: payload.numel()] = payload
    buffers = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(buffers, padded)
    return [
        json.loads(buffer[: int(size)].numpy().tobytes())
        for buffer, size in zip(buffers, sizes, strict=True)
    ]
