"""Transfers the outputs of one call from the engine's thread to the client.

A format (`openai_completions`, `openai_chat`, `sglang_generate`) is a `Writer`. It writes a stream
and a whole answer from the same pieces, so both are always equal.
"""

import asyncio
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.api.errors import Json, error_body, failure, internal
from serve.api.limits import unless_disconnected
from serve.api.metrics import CallTimes, Metrics
from serve.engine.request import Output, Request, RequestError
from serve.frontend.client import EngineClient

log = logging.getLogger("serve")

_SLOW_PROMPT = 256
"""An output that names more tokens than this is written outside the event loop."""


class Writer(ABC):
    """Writes the answer to one call."""

    requests: Sequence[Request]
    stream: bool
    names: Sequence[str]
    """Identify the call for `/abort_request`; no two calls under way have one in common."""

    @abstractmethod
    def add(self, output: Output) -> list[Json]:
        """Record an output; returns its events."""

    @abstractmethod
    def end(self) -> list[Json]:
        """Events after the last output."""

    @abstractmethod
    def whole(self) -> Json | list[Json]:
        """The whole answer, after the last output."""


class Answer:
    """One call that runs in the engine."""

    def __init__(self, engine: EngineClient, writer: Writer, metrics: Metrics) -> None:
        self.engine = engine
        self.writer = writer
        self.requests = list(writer.requests)
        self.times = CallTimes(metrics)
        self.aborted = False
        self.on_close: Callable[[], None] = lambda: None
        self._outputs: asyncio.Queue[Output] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def submit(self) -> None:
        """Raises RequestError if the queue is full or the server stops."""

        def deliver(output: Output) -> None:
            self._loop.call_soon_threadsafe(self._outputs.put_nowait, output)

        self.engine.submit(self.requests, deliver)
        self.times.begin(self.requests)

    def cancel(self) -> None:
        """Its unfinished requests end without further outputs."""
        self.engine.cancel(self.requests)
        self.times.close()
        self.on_close()

    def abort(self) -> None:
        """End it for the client, too: with finish reason `abort`. Called in the event loop."""
        self.aborted = True
        self.engine.cancel(self.requests)
        for request in self.requests:
            self._outputs.put_nowait(Output(request, "", [], [], "cancelled"))

    async def _events(self) -> AsyncIterator[Json]:
        """Raises RequestError if a request failed."""
        left = set(self.requests)
        while left:
            output = await self._outputs.get()
            if output.request not in left:
                continue
            error = failure(output.finish_reason)
            if error is not None and not self.aborted:
                self.times.fail(output.request)
                raise error
            if output.finish_reason is not None:
                left.discard(output.request)
            self.times.add(output)
            scored = len(output.request.prompt_logprobs) > _SLOW_PROMPT
            write = self.writer.add
            events = await asyncio.to_thread(write, output) if scored else write(output)
            for event in events:
                yield event
        for event in self.writer.end():
            yield event

    async def respond(self, http: HttpRequest) -> Response:
        """Submit the requests and answer."""
        try:
            self.submit()
        except RequestError:
            self.on_close()
            raise
        if self.writer.stream:
            return _EventStream(self)
        try:
            return JSONResponse(await unless_disconnected(http, self._whole()))
        finally:
            self.cancel()

    async def _whole(self) -> Json | list[Json]:
        async for _ in self._events():
            pass
        return self.writer.whole()

    async def server_sent_events(self) -> AsyncIterator[bytes]:
        """The call as server-sent events, ending with `[DONE]`."""
        try:
            async for event in self._events():
                yield _encode(event)
        except RequestError as error:  # the status is already sent: the error becomes an event
            yield _encode(error_body(error))
        except Exception:
            log.exception("a stream ends with an error")
            yield _encode(error_body(internal()))
        yield b"data: [DONE]\n\n"


class _EventStream(StreamingResponse):
    """Sends an answer's events; cancels its requests even if the client left before the first."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(
            answer.server_sent_events(),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.cancel()


def _encode(content: Json) -> bytes:
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return b"data: " + text.encode() + b"\n\n"
