"""An engine in a process of its own, which is started again when it ends.

HTTP, templates and tokenizing stay in this process, and requests here are copies that the outputs
of the other process complete. If that process ends, its requests get an error, and new ones are
refused until the next has loaded the model. Messages are written by a thread, so that no caller
waits for a process that does not read.
"""

import itertools
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from serve.engine.core import EngineOptions
from serve.engine.input_processor import EngineInfo, InputProcessor
from serve.engine.loading import open_tokenizer
from serve.engine.request import FinishReason, Output, Request, RequestError
from serve.engine.scheduler import n_excess
from serve.frontend.client import Deliver, EngineStats, Status
from serve.frontend.finish_rate import FinishRate
from serve.frontend.process_handle import Launch, ProcessHandle, launch, submission
from serve.frontend.process_messages import Call, Cancel, NewOutput, Outputs, Returned, Start, Stop

log = logging.getLogger("serve")

_STATS_SECONDS = 5.0
"""After which numbers are the last ones that are known."""
_MOST_CALLS = 64
"""Calls that may wait for an answer."""
_STOP_SECONDS = 30.0
"""After which an engine that was requested to end is killed."""
_RETRY_SECONDS = (0.0, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Before the next start, if the engine ends again soon."""
_SOON_SECONDS = 60.0


@dataclass
class _Sent:
    """A request that the other process has."""

    request: Request
    deliver: Deliver


class EngineProcess:
    """An `EngineClient`. Raises UserError if the engine cannot start."""

    def __init__(
        self,
        folder: Path,
        dtype: str,
        device: str,
        options: EngineOptions,
        launched: Launch = launch,
    ) -> None:
        """
        Args:
            folder: The export.
            dtype, device: See `open_export`.
            options: Of the engine.
            launched: Starts a process.
        """
        self._start = Start(str(folder.resolve()), dtype, device, dict(vars(options)))
        self._launch = launched
        self._lock = threading.RLock()
        self._numbers = itertools.count()
        self._sent: dict[int, _Sent] = {}
        self._number_of: dict[Request, int] = {}
        self._calls: dict[int, Future[Returned]] = {}
        self._rate = FinishRate()
        self._status: Status = "starting"
        self._stats = EngineStats()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine process", daemon=True)
        try:
            self._process, info = self._started()
        except EOFError:
            raise UserError(f"{folder}: the engine's process ended while it started") from None
        self._status = "ok"
        tokenizer = open_tokenizer(folder / "tokenizer.json", info.vocab_size)
        self.inputs = InputProcessor(info, tokenizer)
        self._counts = np.zeros((len(info.moe_layers), info.n_experts), dtype=np.int64)

    @property
    def status(self) -> Status:
        return self._status

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._process.popen.pid

    def start(self) -> None:
        """Begin to read what the process sends. A second call has no effect."""
        with self._lock:
            if self._thread.ident is None:
                self._thread.start()

    def stop(self, wait: bool = True) -> None:
        """End the process after its current step; running requests are delivered as cancelled. A
        signal handler may call it without `wait`."""
        self._stopping.set()
        if self._status == "starting":
            self._process.popen.kill()  # it has no requests
        self._process.send(Stop())
        if wait and self._thread.is_alive():
            self._thread.join(_STOP_SECONDS)
            if self._thread.is_alive():
                self._process.popen.kill()
                self._thread.join()
        elif wait:
            self._process.end()

    def submit(self, requests: Sequence[Request], deliver: Deliver, limited: bool = True) -> None:
        """Queue all of `requests` or none of them; see `EngineClient.submit`."""
        with self._lock:
            self._refuse_unless_running()
            if limited:
                self._refuse_if_full(len(requests))
            if not self._sent:
                self._rate.begin()
            numbers = [next(self._numbers) for _ in requests]
            for number, request in zip(numbers, requests, strict=True):
                self._sent[number] = _Sent(request, deliver)
                self._number_of[request] = number
            self._process.send(submission(numbers, requests))

    def refuse_if_full(self) -> None:
        """Raise RequestError if not even one request would be queued."""
        with self._lock:
            self._refuse_unless_running()
            self._refuse_if_full(1)

    def cancel(self, requests: Sequence[Request]) -> None:
        """Stop requests and deliver no more of their outputs. Finished ones are unchanged."""
        with self._lock:
            found = [self._number_of.pop(r) for r in requests if r in self._number_of]
            for number in found:
                del self._sent[number]
            if found:
                self._process.send(Cancel(found))

    def flush_cache(self) -> None:
        """Remove all cached prefixes, between two steps."""
        self._result(self._call("flush_cache"))

    def update_weights(self, folder: str) -> None:
        """Continue with the weights of another export, also after a new start. Raises UserError
        without any change."""
        place = str(Path(folder).resolve())
        self._result(self._call("update_weights", place))
        self._start.weights = place

    def stats(self) -> EngineStats:
        """Of now; if the process does not answer in time, the last ones that are known."""
        with suppress(RequestError, FutureTimeout):
            found = self._call("stats").result(_STATS_SECONDS).stats
            assert found is not None
            self._stats = found
        return self._stats

    def expert_counts(self) -> NDArray[np.int64]:
        """`[MoE layers, experts]`, since the process started or the weights were changed."""
        with suppress(RequestError, FutureTimeout):
            found = self._call("expert_counts").result(_STATS_SECONDS).array
            assert found is not None
            self._counts = found.read()
        return self._counts

    def _refuse_unless_running(self) -> None:
        if self._status == "starting":
            raise RequestError("the engine is starting", None, 503, "unavailable", 5)
        if self._status == "stopped" or self._stopping.is_set():
            raise RequestError("the server is shutting down", None, 503, "unavailable")

    def _refuse_if_full(self, n_new: int) -> None:
        info, n_queued = self.inputs.info, len(self._sent)
        n_more = n_excess(info.max_waiting + info.max_running, n_queued, n_new)
        if n_more:
            seconds = self._rate.retry_after(n_more, max(0, n_queued - info.max_running))
            message = "the server is at its limit; try again later"
            raise RequestError(message, None, 429, "overloaded", seconds)

    def _call(self, name: str, text: str = "") -> Future[Returned]:
        future: Future[Returned] = Future()
        with self._lock:
            self._refuse_unless_running()
            if len(self._calls) >= _MOST_CALLS:
                raise RequestError("the engine does not respond", None, 503, "unavailable")
            number = next(self._numbers)
            self._calls[number] = future
            self._process.send(Call(number, name, text))
        return future

    def _result(self, future: Future[Returned]) -> None:
        returned = future.result()
        if returned.error is not None and returned.is_users:
            raise UserError(returned.error)
        if returned.error is not None:
            raise RequestError(returned.error, None, 503, "unavailable")

    def _started(self) -> tuple[ProcessHandle, EngineInfo]:
        """A new process that is ready. Raises UserError or EOFError."""
        process = self._process = ProcessHandle(self._launch)
        process.send(self._start)
        try:
            return process, process.wait_until_ready()
        except BaseException:
            process.popen.kill()
            process.end()
            raise

    def _run(self) -> None:
        """Read what the process sends; start another one when it has ended."""
        delays, begun = iter(_RETRY_SECONDS), time.monotonic()
        while True:
            self._read(self._process)
            with self._lock:
                self._status = "stopped" if self._stopping.is_set() else "starting"
                left, calls = list(self._sent.values()), list(self._calls.values())
                self._sent, self._number_of, self._calls = {}, {}, {}
            self._fail(left, calls)
            code = self._process.end()
            if self._stopping.is_set():
                return self.inputs.close()
            log.error("the engine's process ended (exit code %d); it is started again", code)
            if time.monotonic() - begun > _SOON_SECONDS:
                delays = iter(_RETRY_SECONDS)
            begun = time.monotonic()
            if not self._start_again(delays):
                self._status = "stopped"
                return self.inputs.close()

    def _start_again(self, delays: Any) -> bool:
        """False if the server stops meanwhile."""
        while not self._stopping.wait(next(delays, _RETRY_SECONDS[-1])):
            try:
                self._process, _ = self._started()
            except (UserError, EOFError, OSError) as error:
                log.error("the engine's process does not start: %s", error or "it ended")
                continue
            self._status = "ok"
            if self._stopping.is_set():  # it may have missed it
                self._process.send(Stop())
            log.warning("the engine's process has started again")
            return True
        return False

    def _read(self, process: ProcessHandle) -> None:
        with suppress(EOFError):
            while True:
                message = process.connection.receive()
                if isinstance(message, Outputs):
                    for output in message.outputs:
                        self._deliver(output)
                elif isinstance(message, Returned):
                    with self._lock:
                        future = self._calls.pop(message.number, None)
                    if future is not None:
                        future.set_result(message)

    def _deliver(self, new: NewOutput) -> None:
        with self._lock:
            sent = self._sent.get(new.number)
            if sent is None:
                return  # it was cancelled
            request = sent.request
            if new.finish_reason is not None:
                del self._sent[new.number]
                self._number_of.pop(request, None)
                self._rate.count()
        request.tokens += new.tokens
        request.num_cached = new.num_cached
        request.prompt_logprobs += new.prompt_logprobs
        request.matched = new.matched
        if new.routed_experts is not None:
            request.routed_experts = new.routed_experts.read()
        self._hand_out(sent, new.text, new.tokens, new.logprobs, new.finish_reason)

    def _fail(self, left: Sequence[_Sent], calls: Sequence[Future[Returned]]) -> None:
        """End what the lost process had."""
        reason: FinishReason = "cancelled" if self._stopping.is_set() else "lost"
        for sent in left:
            self._hand_out(sent, "", [], [], reason)
        for future in calls:
            future.set_exception(RequestError("the engine has ended", None, 503, "unavailable"))

    def _hand_out(
        self, sent: _Sent, text: str, tokens: list[int], scores: list[Any], reason: Any
    ) -> None:
        request = sent.request
        request.finish_reason = reason
        try:
            sent.deliver(Output(request, text, tokens, scores, reason))
        except Exception:  # its event loop is closed: outputs are not read any more
            self.cancel([request])
