"""This process among the others: its rank, its device, its process group.

One code path for one process and for many: without torchrun a one-rank group is made from a
`HashStore`, so FSDP2 and the collectives run the same code everywhere. On CUDA the default group
has two backends, NCCL for tensors on the device and gloo for those on the host, so that control
messages (stop flags, JSON) never wait for the device.
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

from configs.rules import ConfigError
from kernels.heap import keep_freed_memory
from parallel.gloo import one_thread_per_group


@dataclass(frozen=True)
class Ranks:
    """Where this process stands."""

    rank: int
    world: int
    device: torch.device
    store: dist.Store
    _decisions: "count[int]" = field(default_factory=count)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def on_first(self, function: Callable[[], Any]) -> Any:
        """Run `function` on rank 0; all ranks get its result (JSON), or its error as ConfigError.

        The others wait on the store, without a limit: preparing a corpus may take hours, and a
        collective would time out. Whatever reads or writes shared files and decides what all ranks
        do next belongs here, since ranks on other hosts may see the files later.
        """
        key = f"decision/{next(self._decisions)}"
        if self.is_first:
            try:
                answer = {"result": function()}
            except ConfigError as error:
                answer = {"error": str(error)}
            except OSError as error:
                answer = {"error": f"{error.filename}: {error.strerror}"}
            self.store.set(key, json.dumps(answer))
        else:
            self.store.wait([key], timedelta(days=30))
        answer = json.loads(self.store.get(key))
        if "error" in answer:
            raise ConfigError(answer["error"])
        return answer["result"]


def start_ranks(threads: int = 0) -> Ranks:
    """Join the process group that torchrun describes, or make a group of one.

    threads: CPU threads of this process; 0: OMP_NUM_THREADS where somebody set it, else the cores
    it may use, divided among the ranks of this host.
    """
    env = os.environ
    rank, world = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    local_rank, local_world = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
    # torchrun sets OMP_NUM_THREADS to 1 where nobody did, so there 1 says nothing
    given = env.get("OMP_NUM_THREADS", "")
    if threads or not given or ("RANK" in env and given == "1"):
        torch.set_num_threads(threads or max(usable_cores() // local_world, 1))
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    one_thread_per_group()
    store = _store(rank, world)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return Ranks(rank, world, device, store)


def usable_cores() -> int:
    """Cores this process may use: a batch system may give it fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _store(rank: int, world: int) -> dist.Store:
    """The meeting point of the ranks.

    Keys are kept apart by attempt: torchrun reuses its store when it restarts the workers, which
    would otherwise find the addresses of the processes before them.
    """
    env = os.environ
    if "RANK" not in env:
        return dist.HashStore()
    agent_has_it = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address = env.get("MASTER_ADDR", "127.0.0.1"), int(env.get("MASTER_PORT", 29500))
    store = dist.TCPStore(*address, world, is_master=rank == 0 and not agent_has_it)
    return dist.PrefixStore(f"attempt-{env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def stop_ranks() -> None:
    """Leave the process group together; a gloo rank that leaves early can abort its peers."""
    dist.barrier()
    dist.destroy_process_group()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in place; the backend follows the tensor's device."""
    dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on at least one rank. A host-side exchange: no device is touched."""
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
