"""What every request has to pass before a route handles it."""

import asyncio
import hashlib
import hmac
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.api.errors import draining, error_response
from serve.api.http_server import MAX_HEADER_BYTES
from serve.engine.request import RequestError

MAX_BODY_BYTES = 4 * 2**20
MAX_BODY_SECONDS = 30.0
"""A client that has not sent its body within this time gets 408."""

_T = TypeVar("_T")


@dataclass
class Drain:
    """Whether the server is shutting down: it accepts no more work."""

    started: asyncio.Event = field(default_factory=asyncio.Event)
    loop: asyncio.AbstractEventLoop | None = None
    """The server's, once it runs."""

    def start(self) -> None:
        """Refuse work from now on. From any thread or signal handler."""
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self.started.set)

    def refuse(self) -> None:
        """Raise RequestError (503) if it is."""
        if self.started.is_set():
            raise draining()


class HeaderLimit:
    """Rejects large headers with 431; the HTTP library only limits what it has to store."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            size = sum(len(name) + len(value) for name, value in scope["headers"])
            if size + len(scope["raw_path"]) + len(scope["query_string"]) > MAX_HEADER_BYTES:
                error = RequestError("the headers are too large", None, 431, "headers_too_large")
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class ApiKey:
    """Requires `Authorization: Bearer KEY` on every path but /health and the page, which has no
    data. The time of the comparison depends neither on where a wrong key differs nor on its
    length."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self.digest = hashlib.sha256(b"Bearer " + key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in ("/health", "/"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(hashlib.sha256(given).digest(), self.digest):
                error = RequestError(
                    "the API key is wrong or missing", None, 401, "invalid_api_key"
                )
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def read_body(http: HttpRequest, drain: Drain) -> bytes:
    """The body. Raises RequestError: 413 beyond the limit, 408 if it does not arrive in time, 503
    if the server shuts down meanwhile."""
    drain.refuse()
    reading = asyncio.ensure_future(_read_limited(http))
    stopped = asyncio.ensure_future(drain.started.wait())
    try:
        done, _ = await asyncio.wait(
            {reading, stopped}, timeout=MAX_BODY_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        if reading in done:
            return reading.result()
        if stopped in done:
            raise draining()
        raise RequestError("the body did not arrive in time", None, 408, "timeout")
    finally:
        reading.cancel()
        stopped.cancel()


async def _read_limited(http: HttpRequest) -> bytes:
    too_large = RequestError(
        f"the body is larger than {MAX_BODY_BYTES} bytes", None, 413, "request_too_large"
    )
    if int(http.headers.get("content-length", 0)) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise too_large
    return bytes(body)


async def unless_disconnected(http: HttpRequest, answer: Coroutine[object, object, _T]) -> _T:
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
