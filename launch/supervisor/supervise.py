"""The loop of attempts: start all ranks, wait until one fails, end the others, decide.

The supervisor starts the ranks itself: as their parent it reads which one failed first and how,
reaches stopped processes with SIGKILL, and gives every attempt its own rendezvous. Ranks find most
hangs themselves and name the late rank (`train/health`); the supervisor ends an attempt whose ranks
cannot: a stopped process, or a single rank that no longer progresses.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType

from configs.errors import UserError
from configs.health import heartbeat
from configs.health.settings import HealthConfig
from launch.supervisor import processes
from launch.supervisor.fork_server import Child, Starter
from launch.supervisor.heartbeat_folder import heartbeat_folder
from launch.supervisor.policy import INTERRUPTED, USER_ERROR, Ended, History, Limits
from launch.supervisor.processes import Rank

_POLL_S = 0.05
_LONGEST_S = 1.0
"""Time between two looks at the heartbeats that is not a pause of this process, as of the whole
machine, which is no time of the ranks."""
_OWN_WORDS_S = 8.0
"""Time that the other ranks have after one ended with an error of its own: rank 0 prints, waits for
the others to read the error, and ends (`parallel.launch_environment.fail`)."""
_MARGIN_S = 8.0
"""Time beyond a limit that the ranks have to end a hanging attempt themselves, and to name the
rank."""


class Supervisor:
    """Runs one training to its end, or until it should not be repeated."""

    def __init__(
        self,
        arguments: Sequence[str],
        ranks: int,
        folder: Path,
        limits: Limits,
        health: HealthConfig,
        module: str = "train",
    ) -> None:
        """folder: of the run (`run.dir`). health: of the experiment. module: that the ranks run,
        `python -m MODULE`."""
        self.module, self.health = module, health
        self.arguments, self.ranks, self.folder = arguments, ranks, folder
        self.history = History(limits, ranks, newest_checkpoint(folder))
        self.logs = folder / "launch"
        self.number = _last_attempt(self.logs)
        self.starter = Starter()
        self.stopping: list[int] = []
        self.running: list[Rank] = []

    def run(self) -> int:
        """All attempts; returns the exit code: 0, 75 or 130 after a stop, 2 for a user error, else
        that of the last failure."""
        with self._signals(), closing(self.starter):
            while True:
                self.number += 1
                logs = self._log_folder()
                ended = self._attempt(logs)
                decision = self.history.decide(ended, self.stopped, time.monotonic())
                failed = ended.code != 0 and not self.stopping and ended.code not in (
                    USER_ERROR, os.EX_TEMPFAIL, INTERRUPTED,
                )  # fmt: skip
                if failed:
                    self._say(
                        f"attempt {self.number}: rank {ended.rank} {ended.reason} in "
                        f"{ended.place}; logs: {logs}"
                    )
                for line in decision.lines:
                    self._say(line)
                if decision.code is not None:
                    return decision.code
                self._pause(decision.pause_s)
                if self.stopping:
                    return INTERRUPTED if self.stopped == signal.SIGINT else os.EX_TEMPFAIL
                self._say(f"attempt {self.number + 1} starts from the newest checkpoint")

    @property
    def stopped(self) -> int:
        """The first signal to stop; 0 if there was none."""
        return self.stopping[0] if self.stopping else 0

    def _attempt(self, logs: Path) -> Ended:
        with heartbeat_folder() as beats:
            words = [self.module, *self.arguments]
            ranks, store = processes.start(self.starter, words, self.ranks, logs, beats)
            self.running = ranks
            try:
                code, rank = self._wait(ranks, store, beats)
                records = [heartbeat.read(beats, each) for each in range(self.ranks)]
                named = _culprit(beats)
                if named is not None and code not in (os.EX_TEMPFAIL, INTERRUPTED):
                    code, rank = heartbeat.HANG_CODE, named
                beat = heartbeat.read(beats, rank)
                return Ended(
                    code, rank, beat.place if beat else "start",
                    max((each.done for each in records if each), default=0),
                    newest_checkpoint(self.folder),
                )  # fmt: skip
            finally:
                self.running = []
                processes.kill([*(one.process for one in ranks), *([store] if store else [])])
                for one in ranks:
                    one.close()

    def _wait(self, ranks: list[Rank], store: Child | None, beats: Path) -> tuple[int, int]:
        """Exit code and rank of the first failure; (0, 0) after all have ended well."""
        watch = _Watch(ranks, store, beats, self.health)
        while True:
            busy = [one.show() for one in ranks]
            codes = [one.process.poll() for one in ranks]
            failed = [one for one, code in zip(ranks, codes, strict=True) if code]
            if failed:
                return self._end(ranks, min(failed, key=_severity))
            if all(code == 0 for code in codes):
                return 0, 0
            if store is not None and store.poll() is not None:
                self._say(f"error: the process of the store ended with code {store.code}")
                return heartbeat.HANG_CODE, 0
            if late := watch.late():
                rank, line = late
                if not self.stopping:
                    self._say(line)
                return heartbeat.HANG_CODE, rank
            if not any(busy):
                time.sleep(_POLL_S)

    def _end(self, ranks: list[Rank], first: Rank) -> tuple[int, int]:
        """End the attempt after its first failure; returns its exit code and rank.

        After a stop or an error that a rank reports itself the others may still print or save;
        after a signal or a hang nothing of the attempt is left to wait for.
        """
        code = first.process.code or 0
        others = [one for one in ranks if one is not first]
        if code == USER_ERROR:
            processes.send(others, signal.SIGTERM)
            processes.wait_until_ended(others, _OWN_WORDS_S)
        elif code in (os.EX_TEMPFAIL, INTERRUPTED):
            processes.wait_until_ended(others, _OWN_WORDS_S)
        elif code > 0 and code != heartbeat.HANG_CODE:
            processes.wait_until_ended(others, 0.5)
        return code, first.rank

    def _pause(self, seconds: float) -> None:
        if seconds:
            self._say(f"the next attempt starts in {seconds:.0f} s")
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.stopping:
            time.sleep(min(_POLL_S, seconds))

    def _log_folder(self) -> Path:
        logs = self.logs / f"attempt-{self.number:04}"
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{logs}: cannot be written: {error.strerror}") from None
        return logs

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Pass signals to the ranks, which save; a second one reaches them too, and ends them at
        once. After Ctrl-C on a terminal they get the signal twice, which they treat as one."""

        def stop(number: int, frame: FrameType | None) -> None:
            self.stopping.append(number)
            processes.send(self.running, number)

        before = {number: signal.signal(number, stop) for number in processes.STOPS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _say(self, line: str) -> None:
        print(f"{self.folder}: {line}", file=sys.stderr, flush=True)


class _Watch:
    """Finds ranks that are stopped or silent, from their heartbeats."""

    def __init__(
        self, ranks: list[Rank], store: Child | None, beats: Path, health: HealthConfig
    ) -> None:
        self._ranks, self._store, self._beats = ranks, store, beats
        self._frozen_s = health.frozen_s
        self._stopped: dict[int, float] = {}
        """Seconds for which processes have been stopped, by process id."""
        self._silences = [heartbeat.Silence(_LONGEST_S) for _ in ranks]
        self._last = time.monotonic()

    def late(self) -> tuple[int, str] | None:
        """A rank that has been stopped or silent for too long, and the message about it."""
        now = time.monotonic()
        passed, self._last = min(now - self._last, _LONGEST_S), now
        beats = {one.rank: heartbeat.read(self._beats, one.rank) for one in self._ranks}
        silent = {r: self._silences[r].look(b.since) for r, b in beats.items() if b}
        # while one rank saves, for example, the others have to wait for it
        slow = any(b and not b.recurs and silent[r] <= b.limit for r, b in beats.items())
        for one in self._ranks:
            beat = beats[one.rank]
            if one.process.poll() is not None:
                continue
            about = f"rank {one.rank} (process {one.process.pid})"
            # a rank has no heartbeat while Python starts, and no limits before all have connected
            if seconds := self._frozen(one.process, passed):
                return one.rank, (
                    f"error: {about} has been stopped for {seconds:.0f} s in "
                    f"{beat.place if beat else 'start'} (SIGSTOP, a debugger); the attempt ends"
                )
            if beat and beat.limit and silent[one.rank] > beat.limit + _MARGIN_S and not slow:
                return one.rank, (
                    f"error: {about} has made no progress for {silent[one.rank]:.0f} s in "
                    f"{beat.place}, and its ranks did not end; the attempt ends"
                )
        if self._store is not None and (seconds := self._frozen(self._store, passed)):
            return 0, (
                f"error: the process of the store ({self._store.pid}), through which the ranks "
                f"meet, has been stopped for {seconds:.0f} s (SIGSTOP, a debugger); the attempt "
                "ends"
            )
        return None

    def _frozen(self, process: Child, passed: float) -> float:
        """Seconds for which a process has been stopped, if those are too many, else 0. passed:
        seconds since the last look."""
        stopped = self._frozen_s and processes.is_stopped(process.pid)
        seconds = self._stopped.get(process.pid, 0.0) + passed if stopped else 0.0
        self._stopped[process.pid] = seconds
        return seconds if seconds > self._frozen_s + _MARGIN_S else 0.0


def newest_checkpoint(run: Path) -> int:
    """Step of the newest checkpoint of a run; -1 if there is none."""
    found = [
        re.fullmatch(r"step-(\d+)", path.name) for path in (run / "checkpoints").glob("step-*")
    ]
    return max((int(match[1]) for match in found if match), default=-1)


def _last_attempt(logs: Path) -> int:
    found = [re.fullmatch(r"attempt-(\d+)", path.name) for path in logs.glob("attempt-*")]
    return max((int(match[1]) for match in found if match), default=0)


def _severity(rank: Rank) -> int:
    """Order of several failures that were noticed together: a signal is the cause of the others,
    then a user error, then an error of its own."""
    code = rank.process.code or 0
    return 0 if code < 0 else 1 if code == USER_ERROR else 2


def _culprit(beats: Path) -> int | None:
    """The rank that the ranks themselves have named, if they have."""
    try:
        return int((beats / heartbeat.CULPRIT).read_text())
    except (OSError, ValueError):
        return None
