"""The process that writes a rank's files: `main(ADDRESS, [BUFFER])`, started by `client`.

It has neither torch nor the interpreter lock of the trainer, and runs in the idle class of the
scheduler (elsewhere: at the lowest priority): it gets time that the steps leave, and its reads and
writes are the last in the queue of the disk. Where the ranks leave it no core, it computes a small
share of the time only (`pace`). Transfers to an object store have the lowest priority.

ADDRESS is where the checkpoints are; BUFFER is the file descriptor of the memory that it shares
with the rank. Requests come through the standard input (`messages`), one after another:

    {"call": method of the storage, "arguments": {...}} -> {"result": ...} or {"error": one line}
    {"urgent": true}: the rank waits, so run at normal priority until {"urgent": false}

It ends with its rank: when the pipe is closed, also within a file. Signals to stop do not end it,
because its rank still needs it then.
"""

import mmap
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, BinaryIO

from configs.errors import UserError
from train.checkpoint.storage.addresses import storage_at
from train.checkpoint.storage.base import Storage
from train.checkpoint.storage.messages import receive, send
from train.checkpoint.storage.pace import Pace

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_LOWEST = 19


class _Worker:
    """A thread with its own priority that runs functions for another one."""

    def __init__(self, idle: bool) -> None:
        """idle: run only when nothing else does."""
        self._idle = idle
        self._in: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        self._out: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def run(self, function: Callable[[], Any]) -> Any:
        self._in.put(function)
        result, error = self._out.get()
        if error is not None:
            raise error
        return result

    def _work(self) -> None:
        if self._idle:
            _leave_time_to_others()
        while True:
            function = self._in.get()
            try:
                self._out.put((function(), None))
            except BaseException as error:
                self._out.put((None, error))


def _leave_time_to_others() -> None:
    """Let this thread run only when no other needs the core. On Linux each thread has a class and a
    priority of its own; a thread without privileges cannot go back."""
    _use_lowest_priority()
    with suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _use_lowest_priority() -> None:
    """Let this thread, and those that it starts, have little time while others need the core."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)


def open_storage(address: str) -> Storage:
    """The storage at an address. The client of an object store starts a thread for its transfers,
    which must not slow steps either. It serves files of both priorities and cannot be raised again,
    so it has the lowest one, but is not in the idle class, in which it might get no time at all
    while a rank waits for it."""
    with ThreadPoolExecutor(1, initializer=_use_lowest_priority) as one:
        return one.submit(storage_at, address).result()


class Writer:
    """Runs methods of a storage; a file in pieces, each at the priority that is set at its
    start."""

    def __init__(self, storage: Storage, buffer: mmap.mmap | None) -> None:
        self.storage, self.buffer = storage, buffer
        self.urgent = threading.Event()
        self._slow, self._fast = _Worker(idle=True), _Worker(idle=False)

    def call(self, name: str, frames: list[bytes], arguments: dict[str, Any]) -> Any:
        """The result of a method."""
        if name == "write_image":
            assert self.buffer is not None
            size = arguments.pop("size")
            work = self.storage.write(**arguments, blocks=[memoryview(self.buffer)[:size]])
        elif name == "commit_parts":
            return self._run(lambda: self.storage.commit_parts(frames, **arguments))
        else:
            return self._run(lambda: getattr(self.storage, name)(**arguments))
        return self._run_pieces(work)

    def _run(self, function: Callable[[], Any]) -> Any:
        return (self._fast if self.urgent.is_set() else self._slow).run(function)

    def _run_pieces(self, work: Generator[None, None, Any]) -> Any:
        """One worker runs all pieces up to a change of the priority: handing over each of them
        would wake up another thread twice per piece."""
        result: list[Any] = []

        def pieces(is_urgent: bool) -> None:
            pace = Pace()
            try:
                while self.urgent.is_set() == is_urgent:
                    next(work)
                    if not is_urgent:
                        self.urgent.wait(pace.pause())
            except StopIteration as ended:
                result.append(ended.value)

        while not result:
            is_urgent = self.urgent.is_set()
            worker = self._fast if is_urgent else self._slow
            worker.run(partial(pieces, is_urgent))
        return result[0]


def answer(writer: Writer, name: str, frames: list[bytes], arguments: Any) -> dict[str, Any]:
    """The reply to a request."""
    try:
        return {"result": writer.call(name, frames, arguments)}
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return {"error": f"{where}{error.strerror or error}"}
    except UserError as error:
        return {"error": str(error)}
    except Exception as error:  # the rank reports it, and tries again
        return {"error": f"{type(error).__name__}: {error}"}


def main(address: str, descriptor: str = "") -> None:
    """Answer requests until the rank ends."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    replies: BinaryIO = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no reply
    buffer = mmap.mmap(int(descriptor), 0) if descriptor else None
    writer = Writer(open_storage(address), buffer)
    calls: SimpleQueue[tuple[str, list[bytes], Any]] = SimpleQueue()

    def work() -> None:
        while True:
            reply = answer(writer, *calls.get())
            try:
                send(replies, reply)
            except BrokenPipeError:  # the rank was killed, which the main thread may not know yet
                os._exit(0)

    threading.Thread(target=work, daemon=True).start()
    while message := receive(sys.stdin.buffer):
        header, frames = message
        if "urgent" in header:
            (writer.urgent.set if header["urgent"] else writer.urgent.clear)()
        else:
            calls.put((header["call"], frames, header["arguments"]))
    os._exit(0)
