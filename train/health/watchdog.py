"""Ends an attempt in which a rank is frozen or hangs, after naming the rank.

A thread of every rank publishes a sign of life in the launcher's store once per second, looks at
the next rank of its host, and compares the time since the main thread's last progress with its
limit. The rank that finds something raises the alarm; every rank then writes its stacks to a file
and sends its last collectives (`train.health.collectives`), one of them prints the result, and all
end with `configs.health.heartbeat.HANG_CODE`. Threads run while the main thread waits.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch.distributed as dist

from configs.health.heartbeat import CULPRIT, FOLDER_VARIABLE, HANG_CODE, Silence, read
from configs.health.settings import HealthConfig
from parallel.launch_environment import print_line
from parallel.ranks import Ranks
from train.atomic_files import replace_text
from train.health.collectives import find_late, parse, recorded, waits_for_others
from train.health.heartbeat import Heartbeat

PERIOD_S = 1.0
PROCESSES = "processes.json"
"""File in the run's folder with host and process id of every rank of the running attempt."""
_ANSWER_S = 4.0
"""Time limit for the ranks' answers to an alarm."""
_STACK_SIGNAL = signal.SIGUSR2


class Watchdog:
    """Watches this rank and the next one of its host, from `start` to `stop`."""

    def __init__(self, heartbeat: Heartbeat, ranks: Ranks, folder: Path) -> None:
        """folder: of the run; stacks are written to its `stacks` folder."""
        self.heartbeat, self.rank, self.world = heartbeat, ranks.rank, ranks.world
        self.limits: HealthConfig = heartbeat.limits
        self.folder, self.run = folder / "stacks", folder
        self.host = socket.gethostname()
        self.store: dist.Store = (
            ranks.store.clone() if ranks.world > 1 else ranks.store  # type: ignore[attr-defined]
        )
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._file: TextIO | None = None
        self._beats = 0
        self._peer = _Peer()
        self._cause, self._first, self._frozen = "", False, -1
        self._ending = threading.Lock()

    def start(self) -> None:
        """Start watching."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / f"rank-{self.rank:05}.txt").open("w")
        # runs without the interpreter's lock, which a library may hold
        faulthandler.register(_STACK_SIGNAL, self._file, all_threads=True)
        self.store.set(f"process/{self.rank}", f"{os.getpid()} {self.host}")
        if self.world == 1:
            self._write_processes([f"{os.getpid()} {self.host}"])
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; call it before the store ends. May be called again."""
        self._over.set()
        file, self._file = self._file, None
        if file is None:
            return
        self._thread.join(10.0)
        faulthandler.unregister(_STACK_SIGNAL)
        file.close()
        with suppress(OSError):  # the folder may have files of other ranks
            Path(file.name).unlink()
            self.folder.rmdir()

    def explain(self, error: RuntimeError) -> None:
        """After a collective has failed although all ranks run: name the rank that entered another
        one than the others, and end. Returns after other errors."""
        text = str(error)
        if self.world > 1 and (isinstance(error, dist.DistError) or "gloo" in text.lower()):
            self._cause = (text.splitlines() or [""])[0][:200]
            with suppress(RuntimeError):  # the store ended with its process
                self._alarm()

    def _watch(self) -> None:
        with suppress(RuntimeError):  # the store ended with its process
            silence = Silence(2 * PERIOD_S)
            while not self._over.wait(PERIOD_S):
                self._beats += 1
                beat = self.heartbeat.beat
                silent = silence.look(beat.since)
                if self.world > 1:
                    slow = int(not beat.recurs and silent <= beat.limit and not waits_for_others())
                    self.store.set(f"beat/{self.rank}", f"{self._beats} {slow} {beat.place}")
                    if self.store.check(["alarm"]):
                        self._end()
                if beat.limit and silent > beat.limit and not self._others_are_slow():
                    self._alarm()
                if self.world > 1 and beat.frozen_s and self._next_is_frozen(beat.frozen_s):
                    self._frozen = self._peer.rank
                    self._alarm()

    def _others_are_slow(self) -> bool:
        """Whether a rank is in a phase without a usual duration, such as saving, within its limit,
        and does not wait itself: then the others have to wait for it."""
        keys = [f"beat/{rank}" for rank in range(self.world) if rank != self.rank]
        return self.world > 1 and any(
            self.store.get(key).split()[1] == b"1" for key in keys if self.store.check([key])
        )

    def _next_is_frozen(self, limit: float) -> bool:
        """Whether the next rank of this host has been silent and idle for `limit` seconds."""
        peer = self._peer
        if peer.pid == 0:
            self._find_peer()
            return False
        if peer.pid < 0:
            return False
        text = ""
        if self.store.check([f"beat/{peer.rank}"]):
            text = self.store.get(f"beat/{peer.rank}").decode()
        return peer.look(text, _cpu_ticks(peer.pid), time.monotonic()) > limit

    def _find_peer(self) -> None:
        """The next rank on this host, once all ranks have published their processes."""
        keys = [f"process/{rank}" for rank in range(self.world)]
        if not self.store.check(keys):
            return
        texts = [self.store.get(key).decode() for key in keys]
        places = [text.split() for text in texts]
        here = [rank for rank, (_, host) in enumerate(places) if host == self.host]
        other = here[(here.index(self.rank) + 1) % len(here)]
        self._peer.rank = other
        self._peer.pid = -1 if other == self.rank else int(places[other][0])
        if self.rank == 0:
            self._write_processes(texts)
        self._peer.local = {rank: int(places[rank][0]) for rank in here if rank != self.rank}

    def _write_processes(self, texts: list[str]) -> None:
        places = dict(enumerate(text.split() for text in texts))
        table = {rank: {"host": host, "pid": int(pid)} for rank, (pid, host) in places.items()}
        replace_text(self.run / PROCESSES, json.dumps(table) + "\n")

    def _alarm(self) -> NoReturn:
        """Raise the alarm, or join one; the first rank prints the result. Ends the process."""
        if self.world > 1:
            self._first = self._first or self.store.add("alarms", 1) == 1
            self.store.set("alarm", "raised")
            self._end()
        self._write_stacks()
        beat = self.heartbeat.beat
        self._print(
            f"no progress for {self.heartbeat.silent_s():.0f} s in {beat.place}", {self.rank}
        )
        self._leave()

    def _end(self) -> NoReturn:
        """Write the stacks, send the state, print the result if this rank
        raised the alarm, end the process."""
        self._ending.acquire()  # by one thread, which ends the process
        with suppress(RuntimeError):
            self._answer()
            answers = self._answers()
            absent = {r: pid for r, pid in self._peer.local.items() if r not in answers}
            for rank, pid in absent.items():
                self.store.set(f"absent/{rank}", _process_state(pid))
            if self._first:
                late, line = self._result(answers)
                self._print(line, late)
                self.store.set("result", line)
            deadline = time.monotonic() + 2 * _ANSWER_S
            while not self.store.check(["result"]) and time.monotonic() < deadline:
                time.sleep(0.05)
            _end_processes(absent.values())  # last, since a supervisor ends all as soon as one ends
        self._leave()

    def _answer(self) -> None:
        """Publish the state of this rank, with its last collectives."""
        self._write_stacks()
        beat = self.heartbeat.beat
        state = {
            "place": beat.place, "silent": self.heartbeat.silent_s(), "entries": recorded()[-600:],
        }  # fmt: skip
        self.store.set(f"state/{self.rank}", json.dumps(state))

    def _answers(self) -> dict[int, Any]:
        """The states of all ranks that answer in time."""
        keys = {rank: f"state/{rank}" for rank in range(self.world)}
        others = [key for rank, key in keys.items() if rank != self._frozen]
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline and not self.store.check(others):
            time.sleep(0.05)
        here = [rank for rank, key in keys.items() if self.store.check([key])]
        return {rank: json.loads(self.store.get(keys[rank])) for rank in here}

    def _result(self, answers: dict[int, Any]) -> tuple[set[int], str]:
        """The late ranks and a line about them."""
        absent = [rank for rank in range(self.world) if rank not in answers]
        late = find_late({r: parse(a["entries"]) for r, a in answers.items()}, absent)
        if absent:
            about = "; ".join(self._absent(rank) for rank in absent[:8])
            more = f"; {late.line}" if late else ""
            return {*absent}, f"{about}{more}"
        if late:
            places = ", ".join(
                f"rank {rank} is in {answers[rank]['place']}" for rank in late.ranks[:8]
            )
            return {*late.ranks}, f"{late.line}; {places}"
        slowest = max(answers, key=lambda rank: answers[rank]["silent"])
        return set(), (
            f"no rank progresses, and none waits for another: rank {slowest} has been in "
            f"{answers[slowest]['place']} for {answers[slowest]['silent']:.0f} s"
        )

    def _absent(self, rank: int) -> str:
        """What is known about a rank that does not answer."""
        place = ""
        if self.store.check([f"beat/{rank}"]):
            place = self.store.get(f"beat/{rank}").decode().split(" ", 2)[2]
        folder = os.environ.get(FOLDER_VARIABLE)
        beat = read(Path(folder), rank) if folder else None
        place = beat.place if beat else place  # newer than the store's
        state = "does not answer"
        if self.store.check([f"absent/{rank}"]):
            state = self.store.get(f"absent/{rank}").decode()
        process = ""
        if self.store.check([f"process/{rank}"]):
            pid, host = self.store.get(f"process/{rank}").decode().split()
            process = f" (process {pid} on {host})"
        return f"rank {rank}{process} {state}" + (f", last in {place}" if place else "")

    def _write_stacks(self) -> None:
        if self._file is not None:
            faulthandler.dump_traceback(self._file, all_threads=True)
            self._file.flush()

    def _print(self, line: str, late: set[int]) -> None:
        line = f"{line} ({self._cause})" if self._cause else line
        print_line(f"error: {self.run}: {line}; stacks of all ranks: {self.folder}")
        place = os.environ.get(FOLDER_VARIABLE)
        if place and late:
            with suppress(OSError):
                (Path(place) / CULPRIT).write_text(str(min(late)))

    def _leave(self) -> NoReturn:
        sys.stdout.flush()
        os._exit(HANG_CODE)


class _Peer:
    """What this rank knows about the next one of its host."""

    def __init__(self) -> None:
        self.rank, self.pid = -1, 0
        self.local: dict[int, int] = {}
        """Process ids of the other ranks of this host."""
        self._text, self._ticks, self._idle, self._last = "", -1, 0.0, 0.0

    def look(self, text: str, ticks: int, now: float) -> float:
        """Seconds for which its sign of life and its CPU time have not changed. Seconds in which
        this thread did not run itself do not count."""
        passed, self._last = min(now - self._last, 2 * PERIOD_S), now
        same = text == self._text and ticks == self._ticks
        self._text, self._ticks = text, ticks
        self._idle = self._idle + passed if same else 0.0
        return self._idle


def _end_processes(pids: Iterable[int]) -> None:
    """Let processes of this host write their stacks, and kill them: a stopped process obeys no
    other signal."""
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, _STACK_SIGNAL)
            os.kill(pid, signal.SIGCONT)  # it runs the handler of the signal before
            time.sleep(0.3)
            os.kill(pid, signal.SIGKILL)


def _process_state(pid: int) -> str:
    """The state of a process of this host, in words."""
    words = _stat(pid)
    if words is None:
        return "has ended" if Path("/proc/self/stat").exists() else "does not answer"
    names = {"T": "is stopped", "t": "is stopped by a debugger", "Z": "has ended",
             "D": "waits for a device or a file system",
             "R": "runs, but does not answer"}  # fmt: skip
    return names.get(words[0], "does not answer")


def _cpu_ticks(pid: int) -> int:
    """CPU time of a process; -1 if it has ended."""
    words = _stat(pid)
    return int(words[11]) + int(words[12]) if words else -1


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name; None if the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
