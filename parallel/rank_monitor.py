"""Finds the ranks that no longer run when a collective has failed.

A killed rank reports nothing, and the error that other ranks get from gloo or NCCL names an address
at best, often that of a rank which only exited because of it. So every rank answers requests in the
store, in a separate thread, also while it waits in a collective. A rank that does not answer is
reported as absent. The only traffic is one small request to the store per second and rank.
"""

import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from parallel.launch_environment import LaunchEnvironment, print_line

_EVERY_S = 1.0
_PATIENCE_S = 6.0
"""Time limit of an answer: the pause between two polls, and a busy interpreter."""


class RankMonitor:
    """Answers the requests of other ranks until `stop`, and sends them."""

    def __init__(self, store: dist.Store, placement: LaunchEnvironment) -> None:
        self.rank, self.world = placement.rank, placement.world
        # a separate connection: a rank may be waiting in another one
        self.store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self.host = socket.gethostname()
        self.store.set(f"host/{self.rank}", self.host)
        self.store.set(f"pid/{self.rank}", str(os.getpid()))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._answer, name="rank monitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop answering; call it before the store ends."""
        self._over.set()
        self._thread.join(_PATIENCE_S)

    def absent(self) -> str | None:
        """A description of the ranks that do not answer, as far as known; None if all answer.

        Called after a collective failed, by all ranks that noticed.
        """
        try:
            call = self.store.add("calls", 1)
            deadline = time.monotonic() + _PATIENCE_S
            missing = [rank for rank in range(self.world) if rank != self.rank]
            while missing and time.monotonic() < deadline:
                time.sleep(0.1)
                missing = [r for r in missing if not self.store.check([f"answer/{call}/{r}"])]
                if ended := [rank for rank in missing if self._has_ended(rank)]:
                    missing = ended
                    break
            named = ", ".join(f"{rank} ({self._host(rank)})" for rank in missing[:20])
            more = f" and {len(missing) - 20} more" if len(missing) > 20 else ""
            return f"rank {named}{more}" if missing else None
        except RuntimeError:  # the store ended with its process
            return "rank 0, or the launcher that held the store,"

    def is_first_to_tell(self) -> bool:
        """True for one of the ranks that ask; for all of them if there is no store."""
        try:
            return bool(self.store.add("told", 1) == 1)
        except RuntimeError:
            return True

    def end_if_lost(self, what: str, advice: str, code: int = 1, is_expected: bool = False) -> None:
        """End the process if ranks do not answer, after a collective has failed; one rank prints a
        line. Returns if all answer.

        what: the name of the run, before the line. advice: what the user can do, after it. code:
        exit code of the process. is_expected: print nothing.
        """
        absent = self.absent()
        if absent is None:
            return
        if not is_expected and self.is_first_to_tell():
            print_line(
                f"error: {what}: {absent} does not answer any more: it failed (its own line is "
                "above then), was killed, ran out of memory, or its host is lost; the other ranks "
                f"stop; {advice}"
            )
        os._exit(code)  # destructors of the process group would wait for the lost ranks

    def end(self, line: str) -> NoReturn:
        """End the process because of an error that only this rank has: the others may wait in a
        collective."""
        print_line(f"error: rank {self.rank}: {line}")
        os._exit(1)

    def _answer(self) -> None:
        answered = 0
        with suppress(RuntimeError):  # the store ended with its rank
            while not self._over.wait(_EVERY_S):
                calls = self.store.add("calls", 0)
                for call in range(answered + 1, calls + 1):
                    self.store.set(f"answer/{call}/{self.rank}", "here")
                answered = calls

    def _has_ended(self, rank: int) -> bool:
        """Whether the process of a rank on this host has ended; False where that is not known."""
        if not self.store.check([f"pid/{rank}"]) or self._host(rank) != self.host:
            return False
        pid = self.store.get(f"pid/{rank}").decode()
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return Path("/proc/self/stat").exists()
        return state in "ZX"

    def _host(self, rank: int) -> str:
        return str(self.store.get(f"host/{rank}").decode())
