"""The engine's thread: other threads hand requests in and get their outputs delivered.

The engine is computed in one thread, HTTP in another, of the same process: on few cores a second
process costs more than it brings, and torch releases the interpreter lock while it computes.
Commands wait in an inbox and take effect between two steps, so the engine itself needs no locks.
"""

import logging
import threading
from collections.abc import Callable, Sequence

from serve.engine.engine import Engine
from serve.engine.request import Output, Request, RequestError

log = logging.getLogger("serve")

Deliver = Callable[[Output], None]
"""Called in the engine's thread with each output of a request; must return at once."""


class EngineThread:
    """Runs an engine until `stop`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._wake = threading.Condition()
        self._submitted: list[Request] = []
        self._cancelled: list[Request] = []
        self._deliver: dict[Request, Deliver] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def start(self) -> None:
        self._thread.start()

    def stop(self, wait: bool = True) -> None:
        """End the thread after its current step; what was under way is delivered as cancelled."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if wait:
            self._thread.join()

    def submit(self, requests: Sequence[Request], deliver: Deliver) -> None:
        """Queue all of `requests` or, with RequestError (503), none of them."""
        with self._wake:
            if not self.alive:
                raise RequestError("the server is shutting down", None, 503, "unavailable")
            self.engine.scheduler.refuse_if_full(len(self._submitted) + len(requests))
            self._submitted += requests
            self._deliver |= dict.fromkeys(requests, deliver)
            self._wake.notify()

    def cancel(self, requests: Sequence[Request]) -> None:
        """Stop requests and deliver no more of them. Finished ones are left as they are."""
        with self._wake:
            self._cancelled += [r for r in requests if self._deliver.pop(r, None) is not None]
            self._wake.notify()

    def _run(self) -> None:
        scheduler = self.engine.scheduler
        try:
            while self._take_commands():
                for output in self.engine.step():
                    self._hand_out(output)
        except BaseException:
            log.exception("the engine stopped")
        finally:
            with self._wake:  # nothing is submitted after this
                self._stopping = True
                left = [*scheduler.running, *scheduler.waiting, *self._submitted]
            for request in left:
                self._hand_out(Output(request, "", [], [], "cancelled"))

    def _take_commands(self) -> bool:
        """Wait until there is work, and take it over. False: it is time to stop."""
        scheduler = self.engine.scheduler
        with self._wake:
            while not (self._stopping or scheduler.busy or self._submitted or self._cancelled):
                self._wake.wait()
            if self._stopping:
                return False
            scheduler.add(self._submitted)
            for request in self._cancelled:
                scheduler.finish(request, "cancelled")
            self._submitted, self._cancelled = [], []
        return True

    def _hand_out(self, output: Output) -> None:
        deliver = self._deliver.get(output.request)
        if output.finish_reason is not None:
            self._deliver.pop(output.request, None)
        if deliver is None:
            return
        try:
            deliver(output)
        except Exception:  # its event loop is closed: nobody reads any more
            self.cancel([output.request])
