"""Starts our programs from tests, as a user would."""

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import forks

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny.toml"
PICTURES = {"TEST_PICTURES": "1"}
"""Additional environment of a training that draws its pictures, as outside of tests."""


def environment() -> dict[str, str]:
    """This environment with one thread per process and our modules on the path."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # always on the CPU: several ranks would compete for one GPU
    return clean | threads | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def command(*arguments: object, ranks: int = 1) -> list[str]:
    """The command line for `python ARGUMENTS` or, with several ranks, torchrun."""
    words = [str(argument) for argument in arguments]
    if ranks == 1:
        return [sys.executable, *words]
    port = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *port]
    return [sys.executable, *launcher, *words]


def run(
    *arguments: object,
    ranks: int = 1,
    code: int = 0,
    timeout: float = 600,
    modules: tuple[str, ...] | None = None,
    env: dict[str, str] | None = None,
    fresh: bool = False,
    cwd: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and check the exit code; prints the output if the code differs.

    The processes are forks of one that has imported `modules`: by default ours, or `transformers`
    for `-P -c CODE`. env: additional variables, which given `modules` find when they are imported;
    without PICTURES a training in a fork draws none. fresh: start Python, and torchrun for several
    ranks.
    """
    words = [str(argument) for argument in arguments]
    if forks.POSSIBLE and not fresh:
        more, given = env or {}, environment()
        if modules is None:
            modules = forks.THEIRS if words[0] == "-P" else forks.OURS
            given, more = given | more, {}
        done = forks.forked(words, given, modules, ranks, timeout, more, cwd)
    else:
        done = subprocess.run(
            command(*arguments, ranks=ranks),
            cwd=cwd,
            env=environment() | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@contextmanager
def started(
    *arguments: object, ranks: int = 1, env: dict[str, str] | None = None, cwd: Path = ROOT
) -> Iterator[forks.Program]:
    """A running program that can be signaled; it is killed at the end. For the arguments see
    `run`."""
    if not forks.POSSIBLE:
        pytest.skip("Linux only")
    words = [str(argument) for argument in arguments]
    with forks.Program(words, environment() | (env or {}), ranks=ranks, cwd=cwd) as program:
        yield program


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the operating system refuse writes of this process beyond `size` bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
