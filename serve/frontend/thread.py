"""The engine's thread: other threads submit requests, and outputs are delivered by callbacks.

The engine runs in one thread, HTTP in another, of the same process: on few cores a second process
is slower, and torch releases the interpreter lock while it computes. Commands wait in an inbox and
take effect between two steps, so the engine itself needs no locks.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.engine.core import EngineCore
from serve.engine.rank_group import BEAT_S
from serve.engine.request import Output, Request, RequestError
from serve.frontend.client import Deliver, EngineStats, Status, read_stats
from serve.frontend.finish_rate import FinishRate

log = logging.getLogger("serve")


class EngineThread:
    """An `EngineClient` that runs an engine in a thread until `stop`.

    after_outputs: called in that thread after the outputs of each step were delivered.
    """

    def __init__(self, core: EngineCore, after_outputs: Callable[[], None] = lambda: None) -> None:
        self.core = core
        self.inputs = core.inputs
        self._after_outputs = after_outputs
        self._wake = threading.Condition()
        self._submitted: list[Request] = []
        self._cancelled: list[Request] = []
        self._calls: list[tuple[Callable[[], list[Output]], Future[None]]] = []
        self._deliver: dict[Request, Deliver] = {}
        self._rate = FinishRate()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    @property
    def status(self) -> Status:
        return "ok" if self.alive else "stopped"

    def start(self) -> None:
        """Start the thread. A second call has no effect."""
        with self._wake:
            if self._thread.ident is None:
                self._thread.start()

    def stop(self, wait: bool = True) -> None:
        """End the thread after its current step; running requests are delivered as cancelled."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if wait and self._thread.is_alive():
            self._thread.join()

    def join(self) -> None:
        """Wait for the end of the thread."""
        self._thread.join()

    def submit(self, requests: Sequence[Request], deliver: Deliver, limited: bool = True) -> None:
        """Queue all of `requests` or none of them, with RequestError: 429 if the queue is full, 503
        if the engine has stopped.

        limited: reject requests that exceed the queue.
        """
        with self._wake:
            if not self.alive:
                raise RequestError("the server is shutting down", None, 503, "unavailable")
            if limited:
                self._refuse_if_full(len(requests))
            self._submitted += requests
            self._deliver |= dict.fromkeys(requests, deliver)
            self._wake.notify()

    def refuse_if_full(self) -> None:
        """Raise RequestError (429) if not even one request would be queued; before any work on
        it."""
        with self._wake:
            self._refuse_if_full(1)

    def _refuse_if_full(self, n_new: int) -> None:
        scheduler, n_coming = self.core.scheduler, len(self._submitted)
        n_excess = scheduler.n_excess(n_new, n_coming)
        if n_excess:
            seconds = self._rate.retry_after(n_excess, len(scheduler.waiting) + n_coming)
            message = "the server is at its limit; try again later"
            raise RequestError(message, None, 429, "overloaded", seconds)

    @contextmanager
    def submitted(self, requests: Sequence[Request], deliver: Deliver) -> Iterator[None]:
        """Submit any number of requests, and cancel the unfinished ones at the end."""
        self.submit(requests, deliver, limited=False)
        try:
            yield
        finally:
            self.cancel(requests)

    def cancel(self, requests: Sequence[Request]) -> None:
        """Stop requests and deliver no more of their outputs. Finished ones are unchanged."""
        with self._wake:
            self._cancelled += [r for r in requests if self._deliver.pop(r, None) is not None]
            self._wake.notify()

    def call(self, function: Callable[[], list[Output]]) -> None:
        """Run `function` between two steps, deliver its outputs, and wait for it."""
        future: Future[None] = Future()
        with self._wake:
            if not self.alive:
                raise RequestError("the server is shutting down", None, 503, "unavailable")
            self._calls.append((function, future))
            self._wake.notify()
        future.result()

    def flush_cache(self) -> None:
        """Remove all cached prefixes, between two steps."""
        self.call(self.core.flush_cache)

    def update_weights(self, folder: str) -> None:
        """Continue with the weights of another export. Raises UserError without any change."""
        self.call(lambda: self.core.update_weights(Path(folder)))

    def stats(self) -> EngineStats:
        return read_stats(self.core)

    def expert_counts(self) -> NDArray[np.int64]:
        """See `EngineCore.expert_counts`."""
        if self.core.export.group is None:
            return self.core.expert_counts()
        found: list[NDArray[np.int64]] = []

        def count() -> list[Output]:
            found.append(self.core.expert_counts())
            return []

        self.call(count)
        return found[0]

    def _run(self) -> None:
        scheduler = self.core.scheduler
        try:
            while self._take_commands():
                for output in self.core.step():
                    self._hand_out(output)
                self._after_outputs()
        except BaseException:
            log.exception("the engine stopped")
        finally:
            with self._wake:  # nothing is submitted after this
                self._stopping = True
                left = [*scheduler.running, *scheduler.waiting, *self._submitted]
                calls, self._calls = self._calls, []
            for _, future in calls:
                future.set_exception(RequestError("the engine has stopped", None, 503))
            self.core.close()
            for request in left:
                self._hand_out(Output(request, "", [], [], "cancelled"))
            self._after_outputs()

    def _take_commands(self) -> bool:
        """Wait for work and take the commands from the inbox. False if the thread must stop."""
        if self.core.kv_events is not None:
            self.core.kv_events.flush()
        scheduler = self.core.scheduler
        with self._wake:
            idle = not self.core.busy
            while not (self._stopping or self.core.busy or self._has_commands):
                if not self._wake.wait(None if self.core.export.group is None else BEAT_S):
                    break  # an idle step checks the other ranks
            if idle:
                self._rate.begin()
            if self._stopping:
                return False
            scheduler.add(self._submitted)
            for request in self._cancelled:
                scheduler.finish(request, "cancelled")
            calls, self._calls = self._calls, []
            self._submitted, self._cancelled = [], []
        for function, future in calls:
            try:
                for output in function():
                    self._hand_out(output)
                future.set_result(None)
            except Exception as error:
                future.set_exception(error)
        return True

    @property
    def _has_commands(self) -> bool:
        return bool(self._submitted or self._cancelled or self._calls)

    def _hand_out(self, output: Output) -> None:
        deliver = self._deliver.get(output.request)
        if output.finish_reason is not None:
            self._deliver.pop(output.request, None)
            self._rate.count()
        if deliver is None:
            return
        try:
            deliver(output)
        except Exception:  # its event loop is closed: outputs are not read any more
            self.cancel([output.request])
