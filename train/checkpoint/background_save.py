"""One save while training continues.

A thread per rank runs the steps of `saving` with the other ranks' threads, through the store; the
rank's writer process does the work.

The thread itself only waits, for the process and for other ranks, so it takes no time from a step.
A save that fails is repeated from the same snapshot, after longer and longer pauses, until it
succeeds or the rank hurries it.
"""

import threading
import time
from itertools import count
from queue import Empty, SimpleQueue

from configs.errors import UserError
from parallel.store_group import Abandoned, StoreGroup
from train.checkpoint.saving import Part, Save, run_save
from train.checkpoint.storage.base import Storage
from train.checkpoint.storage.client import WriterProcess

_LONGEST_PAUSE_S = 60.0


class BackgroundSave:
    """A save in progress; `is_over` is true once it has succeeded or failed."""

    def __init__(
        self, save: Save, part: Part, writer: WriterProcess, group: StoreGroup, storage: Storage
    ) -> None:
        self.save, self._part, self._storage = save, part, storage
        self._writer, self._group = writer, group
        self.error = ""
        """Why it failed; empty if it succeeded. The same on all ranks, like `seconds`."""
        self.failures = 0
        """Attempts that failed."""
        self.seconds = 0.0
        """From its start to its end."""
        self.started = time.monotonic()
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def hurry(self) -> None:
        """Do not repeat the save after the current attempt, and run at normal priority."""
        self._hurry.set()
        self._writer.urgent(True)

    def join(self) -> None:
        """Wait for the end of the thread, which is near after `StoreGroup.abandon`."""
        self._thread.join(5.0)

    def slow_down(self) -> None:
        """Run at the lowest priority again."""
        self._writer.urgent(False)

    def lines(self) -> list[str]:
        """New messages, on rank 0."""
        found = []
        while True:
            try:
                found.append(self._lines.get_nowait())
            except Empty:
                return found

    def _run(self) -> None:
        try:
            for attempt in count():
                self.error = self._attempt()
                if not self.error:
                    break
                self.failures += 1
                pause = min(2.0**attempt, _LONGEST_PAUSE_S)
                self._say_failure()
                if not self._group.on_first(lambda: not self._hurry.wait(pause)):  # noqa: B023
                    break
        except Abandoned:
            self.error = "abandoned"
        except Exception as error:  # the store is lost: a rank has ended
            self.error = f"{type(error).__name__}: {error}"
        self.seconds = time.monotonic() - self.started

    def _attempt(self) -> str:
        try:
            run_save(
                self.save, self._part, self._write, self._writer.call, self._group,
                self._storage, self._lines.put,
            )  # fmt: skip
        except UserError as error:
            return str(error)
        return ""

    def _write(self, partial: str) -> bytes:
        part = self._part
        facts = self._writer.call(
            "write_image", partial=partial, file=part.file, size=part.layout.size
        )
        return part.report(facts["bytes"], facts["crc32"])

    def _say_failure(self) -> None:
        if self.failures == 1 and self._group.is_first:
            self._lines.put(f"{self.error}; training continues, the save is repeated")
