"""Reads the environment variables that the launcher sets for this process, without torch, and ends
a launched process with an error.

torchrun sets all of them. Other launchers, and people, set some: a missing or invalid variable is
an error with its name here, where torch would wait for ranks that never connect.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from configs.errors import UserError

_ALONE = "unset it to train in one process, or start the ranks with torchrun"
_FIRST_RANK_S = 15.0
"""Time that other ranks leave to rank 0, which may have started seconds later on a busy machine."""


_SPINS = "20000"


def configure_libraries() -> None:
    """Set what libraries read from the environment when torch is loaded; given variables stay.

    OpenMP threads that wait for work by spinning, as they do by default, take a busy machine's
    cores from the threads that have work: a step of 0.9 s took 15 s and more. If they sleep at
    once, the kernel must wake them at every operation. So GNU OpenMP spins for about 0.2 ms first.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    # torch's C++ logs a lost connection with its stack; lost ranks are reported in one line
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def disable_amx() -> None:
    """Limit oneDNN, torch's library for bf16 products on a CPU, to AVX512, unless the environment
    names another limit; call it before the first product.

    With AMX the order of oneDNN's sums depends on the number of rows from 512 addends on (3.12).
    With AVX512 it never does, and it is the order of `kernels.fused_cpu`.
    """
    if "DNNL_MAX_CPU_ISA" not in os.environ:  # the older of its two names
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


@dataclass(frozen=True)
class LaunchEnvironment:
    """The rank of this process, the number of ranks, and the address of rank 0."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Index among the processes of this host, and of its CUDA device."""
    local_world: int = 1
    address: str = ""
    """Host of rank 0, with `port`; empty for a single process."""
    port: int = 0

    @property
    def is_launched(self) -> bool:
        """Whether a launcher started this process."""
        return bool(self.address)


def read_launch_environment(env: Mapping[str, str] = os.environ) -> LaunchEnvironment:
    """The placement that the environment describes. Raises UserError, one line."""
    world = read_world(env)
    if "RANK" not in env:
        if world is not None and world > 1:
            raise UserError(f"WORLD_SIZE = {world}, but RANK is not set; {_ALONE}")
        return LaunchEnvironment()
    if world is None:
        raise UserError("RANK is set, but WORLD_SIZE is not; start the ranks with torchrun")
    rank = _number(env, "RANK", 0, world - 1, f"WORLD_SIZE = {world}")
    if world > 1:
        for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in env:
                raise UserError(
                    f"{name} is not set, but WORLD_SIZE = {world}; start the ranks with torchrun"
                )
    local_world = 1
    if "LOCAL_WORLD_SIZE" in env:
        local_world = _number(env, "LOCAL_WORLD_SIZE", 1, world, f"WORLD_SIZE = {world}")
    local_rank = 0
    if "LOCAL_RANK" in env:
        limit = local_world if "LOCAL_WORLD_SIZE" in env else world
        local_rank = _number(env, "LOCAL_RANK", 0, limit - 1, f"{limit} ranks on this host")
    address = env.get("MASTER_ADDR", "127.0.0.1")
    if not re.fullmatch(r"[A-Za-z0-9._:%-]{1,253}", address):
        raise UserError(f"MASTER_ADDR = {address[:80]!r}: must be the host name of rank 0")
    port = _number(env, "MASTER_PORT", 1, 65535, "a TCP port") if "MASTER_PORT" in env else 0
    return LaunchEnvironment(rank, world, local_rank, local_world, address, port)


def read_world(env: Mapping[str, str] = os.environ) -> int | None:
    """WORLD_SIZE, the number of ranks; None if it is not set. Raises UserError."""
    if "WORLD_SIZE" not in env:
        return None
    return _number(env, "WORLD_SIZE", 1, 2**20, "the number of ranks")


def print_line(line: str) -> None:
    """Print to stderr in one write: several ranks print at a time, and an unbuffered `print` would
    write the line and its end apart."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def fail(rank: int, line: str, code: int) -> int:
    """Print the line once and end the process, or return `code` if no launcher started it.

    The launcher stops all ranks as soon as one exits. Other ranks give rank 0 time to print first,
    which usually has the same error; if it prints nothing, they do.
    """
    if rank:
        # sent by the launcher after rank 0 has printed
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_FIRST_RANK_S)
        line = f"rank {rank}: {line}"
    print_line(line)
    if "RANK" in os.environ:
        if not rank and os.environ.get("WORLD_SIZE") != "1":
            time.sleep(3)  # the store may end with this process: the others read the error from it
        os._exit(code)  # other ranks may wait in a collective: do not wait for them
    return code


def _number(env: Mapping[str, str], name: str, low: int, high: int, why: str) -> int:
    text = env[name]
    if not re.fullmatch(r"[0-9]{1,9}", text.strip()) or not low <= int(text) <= high:
        raise UserError(
            f"{name} = {text[:80]!r}: must be an integer from {low} to {high} ({why}); torchrun "
            "sets it"
        )
    return int(text)
