"""HTTP: an OpenAI-compatible server in front of the engine's thread.

The event loop only moves bytes: parsing and tokenizing run in worker threads, computation in the
engine's. However a connection ends, its requests are cancelled, which frees their pages.
Errors have one line for the client; tracebacks are written to the server's log.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.api.completions import (
    Call,
    ChoiceWriter,
    Json,
    error_body,
    join_pieces,
    parse_call,
    usage,
)
from serve.engine.request import Output, Request, RequestError
from serve.frontend.thread import EngineThread

MAX_BODY_BYTES = 4 * 2**20
MAX_HEADER_BYTES = 16 * 2**10
MAX_BODY_SECONDS = 30.0
"""A client that has not sent its body within this time gets 408."""

_FAILURES = {
    "error": RequestError("the request failed inside the server", None, 500, "internal_error"),
    "cancelled": RequestError("the server is shutting down", None, 503, "unavailable"),
}


def build_app(thread: EngineThread, model_name: str, on_ready: Callable[[], None]) -> Starlette:
    """The application; it starts `thread` and stops it. `on_ready` is called once it is ready."""
    api = _Api(thread, model_name)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        thread.start()
        on_ready()
        yield
        await asyncio.to_thread(thread.stop)

    return Starlette(
        routes=[
            Route("/health", api.health),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/v1/completions", api.completions, methods=["POST"]),
        ],
        exception_handlers={
            RequestError: _on_request_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_disconnect,
            Exception: _on_fault,
        },
        middleware=[Middleware(_LimitHeaders)],
        lifespan=lifespan,
    )


class _LimitHeaders:
    """Rejects large headers with 431; the HTTP library only limits what it has to store."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            size = sum(len(name) + len(value) for name, value in scope["headers"])
            if size + len(scope["raw_path"]) + len(scope["query_string"]) > MAX_HEADER_BYTES:
                error = RequestError("the headers are too large", None, 431, "headers_too_large")
                await JSONResponse(error_body(error), 431)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class _Api:
    def __init__(self, thread: EngineThread, model_name: str) -> None:
        self.thread = thread
        self.core = thread.core
        self.model_name = model_name
        self.created = int(time.time())

    async def health(self, http: HttpRequest) -> Response:
        """200 while the engine runs, otherwise 503."""
        if self.thread.alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "the engine has stopped"}, 503)

    async def models(self, http: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, http: HttpRequest) -> Response:
        if http.path_params["name"] != self.model_name:
            raise RequestError("there is no such model here", "model", 404, "model_not_found")
        return JSONResponse(self._card())

    async def completions(self, http: HttpRequest) -> Response:
        body = await _read_body(http)
        call, requests, writers = await asyncio.to_thread(self._prepare, body)
        answer = _Answer(self, call, requests, writers)
        answer.submit()
        if call.stream:
            return _EventStream(answer)
        try:
            return JSONResponse(await _unless_disconnected(http, answer.whole()))
        finally:
            self.thread.cancel(requests)

    def _prepare(self, body: bytes) -> tuple[Call, list[Request], dict[Request, ChoiceWriter]]:
        """Check, tokenize, and create one request per choice."""
        call = parse_call(body, self.model_name)
        writers: dict[Request, ChoiceWriter] = {}
        for prompt in call.prompts:
            tokens = self.core.encode(prompt) if isinstance(prompt, str) else prompt
            for request in self.core.make_requests(tokens, call.params):
                writers[request] = ChoiceWriter(
                    len(writers), request, prompt, call, self.core.export.tokenizer
                )
        return call, list(writers), writers

    def _card(self) -> Json:
        return {
            "id": self.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "phalanx",
            "max_model_len": self.core.export.max_length,
        }


class _Answer:
    """Transfers the outputs of one call from the engine's thread to the client."""

    def __init__(
        self,
        api: _Api,
        call: Call,
        requests: Sequence[Request],
        writers: dict[Request, ChoiceWriter],
    ) -> None:
        self.thread = api.thread
        self.call = call
        self.requests = requests
        self.writers = writers
        self.outputs: asyncio.Queue[Output] = asyncio.Queue()
        self.head: Json = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": api.model_name,
        }

    def submit(self) -> None:
        loop = asyncio.get_running_loop()

        def deliver(output: Output) -> None:
            loop.call_soon_threadsafe(self.outputs.put_nowait, output)

        self.thread.submit(self.requests, deliver)

    async def pieces(self) -> AsyncIterator[Json]:
        """Pieces of all choices as they are generated. Raises RequestError if one of them
        failed."""
        unfinished = len(self.requests)
        while unfinished:
            output = await self.outputs.get()
            if output.finish_reason in _FAILURES:
                raise _FAILURES[output.finish_reason]
            unfinished -= output.finish_reason is not None
            yield self.writers[output.request].piece(output)

    async def whole(self) -> Json:
        parts: list[list[Json]] = [[] for _ in self.requests]
        async for piece in self.pieces():
            parts[piece["index"]].append(piece)
        choices = [join_pieces(part) for part in parts]
        return self.head | {"choices": choices, "usage": usage(self.call, self.requests)}

    async def events(self) -> AsyncIterator[bytes]:
        """The call as server-sent events, ending with `[DONE]`."""
        try:
            async for piece in self.pieces():
                if (
                    piece["text"]
                    or piece["finish_reason"]
                    or "token_ids" in piece
                    or piece["logprobs"]
                ):
                    yield _event(self.head | {"choices": [piece]})
            if self.call.include_usage:
                counts = usage(self.call, self.requests)
                yield _event(self.head | {"choices": [], "usage": counts})
        except RequestError as error:  # the status is already sent: the error becomes an event
            yield _event(error_body(error))
        yield b"data: [DONE]\n\n"


class _EventStream(StreamingResponse):
    """Sends an answer's events; cancels its requests even if the client left before the first."""

    def __init__(self, answer: _Answer) -> None:
        super().__init__(
            answer.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.thread.cancel(self.answer.requests)


def _event(content: Json) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


async def _read_body(http: HttpRequest) -> bytes:
    """The body. Raises RequestError: 413 beyond the limit, 408 if it does not arrive in time."""
    too_large = RequestError(
        f"the body is larger than {MAX_BODY_BYTES} bytes", None, 413, "request_too_large"
    )
    if int(http.headers.get("content-length", 0)) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(MAX_BODY_SECONDS):
            async for part in http.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise RequestError("the body did not arrive in time", None, 408, "timeout") from None
    return bytes(body)


async def _unless_disconnected(http: HttpRequest, answer: Coroutine[Any, Any, Json]) -> Json:
    """The result of `answer`, which is abandoned (ClientDisconnect) when the client leaves."""
    work, gone = asyncio.create_task(answer), asyncio.create_task(_disconnected(http))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        work.cancel()
        gone.cancel()


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _on_request_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return JSONResponse(error_body(error), error.status, headers)


async def _on_http_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    shown = RequestError(error.detail, None, error.status_code, "http_error")
    return JSONResponse(error_body(shown), error.status_code, error.headers)


async def _on_disconnect(http: HttpRequest, error: Exception) -> Response:
    return Response(status_code=499)  # the client is gone


async def _on_fault(http: HttpRequest, error: Exception) -> Response:
    return JSONResponse(error_body(_FAILURES["error"]), 500)
