"""The processes of one attempt: started, shown and logged, ended."""

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from configs.health.heartbeat import FOLDER_VARIABLE, SUPERVISOR_VARIABLE
from launch.render import CHECKOUT
from launch.supervisor.fork_server import Child, Starter

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals after which the ranks save and end, with 75 or (SIGINT) 130."""
_BLOCK = 2**16
_STORE = "train.process.store"


class Rank:
    """One process with its log."""

    def __init__(self, rank: int, process: Child, out: Path, err: Path) -> None:
        self.rank, self.process = rank, process
        self._shown = [(out.open("rb"), sys.stdout), (err.open("rb"), sys.stderr)]

    def show(self) -> bool:
        """Copy what the rank has written since the last call to our own streams; whether there was
        anything."""
        found = False
        for file, stream in self._shown:
            while block := file.read(_BLOCK):
                found = True
                _write(stream, block)
        return found

    def close(self) -> None:
        """Show the rest."""
        self.show()
        for file, _ in self._shown:
            file.close()


def start(
    starter: Starter, words: list[str], ranks: int, logs: Path, heartbeats: Path
) -> tuple[list[Rank], Child | None]:
    """Start `python -m WORDS` on every rank, and the process of the store of several ranks.

    logs: folder of `rank-00000.out` and `.err` of each rank; on a terminal, rank 0 writes its
    progress there and not to the log. heartbeats: folder of their heartbeat files.
    """
    terminal = sys.stdout.isatty()
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH", "")]))
    shared = os.environ | {
        "PYTHONPATH": path, FOLDER_VARIABLE: str(heartbeats),
        SUPERVISOR_VARIABLE: str(os.getpid()),
    }  # fmt: skip
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        shared.pop(name, None)
    if ranks > 1:
        # a rendezvous of this attempt: its port and its store have no earlier addresses
        shared |= {
            "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # as torchrun: no rank has the store
        }  # fmt: skip
    store = None
    if ranks > 1:
        log = logs / "store.err"
        store = starter.start([_STORE, shared["MASTER_PORT"]], shared, log, log)
    started = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        out, err = logs / f"rank-{rank:05}.out", logs / f"rank-{rank:05}.err"
        out.touch()
        err.touch()
        shown = None if terminal and rank == 0 else out
        process = starter.start(words, shared | place, shown, err)
        started.append(Rank(rank, process, out, err))
    return started, store


def kill(children: Sequence[Child]) -> None:
    """End processes at once; SIGKILL reaches stopped ones too."""
    for child in children:
        child.send_signal(signal.SIGKILL)
    for child in children:
        child.wait()


def send(ranks: Sequence[Rank], number: int) -> None:
    """Send a signal to all processes that still run."""
    for one in ranks:
        one.process.send_signal(number)


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped (SIGSTOP, a debugger); False where the system does not show
    it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in (b"T", b"t")


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until_ended(ranks: Sequence[Rank], seconds: float) -> bool:
    """Wait for processes; False if some still run after so many seconds."""
    deadline = time.monotonic() + seconds
    while any(one.process.poll() is None for one in ranks):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
        for one in ranks:
            one.show()
    return True


def _write(stream: object, block: bytes) -> None:
    """Write bytes to a text stream; a reader that has gone does not end the supervisor."""
    with suppress(OSError, ValueError):
        buffer: BinaryIO = stream.buffer  # type: ignore[attr-defined]
        buffer.write(block)
        buffer.flush()
