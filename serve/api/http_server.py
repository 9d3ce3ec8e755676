"""The HTTP connections: uvicorn's protocol with time limits, and errors in JSON.

A client that does not finish its headers, or does not read its response, is cut off, and one more
connection than the limit is refused; without that a few hundred slow sockets occupy the server.
"""

import asyncio
import json
import resource
import socket
import struct
import sys

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.api.errors import error_body
from serve.engine.request import RequestError

MAX_HEADER_BYTES = 16 * 2**10
MAX_CONNECTIONS = 2048
_OTHER_FILES = 256
SEND_BUFFER_BYTES = 2**17
HEADER_SECONDS = 30.0
"""From the start of a connection, or the first byte of another request, to the end of headers."""
STALL_SECONDS = 30.0
"""A client that reads nothing for this time, while its response waits, is cut off."""


class Connection(H11Protocol):
    """One connection."""

    _header_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # otherwise the kernel takes megabytes for a client that reads nothing
        own = transport.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(RequestError("too many connections", None, 503, "overloaded"))
        else:
            self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._header_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        # uvicorn keeps the timer, and so this object, if the client has reset the connection
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.trailing_data[0]:
            self._watch_headers()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(STALL_SECONDS, self._cut_off)

    def _cut_off(self) -> None:
        """Reset the connection; otherwise the kernel keeps what the client does not read."""
        linger = struct.pack("ii", 1, 0)
        self.transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, linger
        )
        self.transport.abort()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        """Called for a request that is not HTTP, inside the handler of the library's error."""
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        if status == 431:
            error = RequestError("the headers are too large", None, 431, "headers_too_large")
        else:
            error = RequestError("this is not a valid HTTP request", None, 400, "invalid_http")
        self._refuse(error)

    def _watch_headers(self) -> None:
        in_request = self.cycle is not None and not self.cycle.response_complete
        if in_request and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        elif not in_request and self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self._end_slow_headers)

    def _end_slow_headers(self) -> None:
        self._refuse(RequestError("the headers did not arrive in time", None, 408, "timeout"))
        self.transport.abort()

    def _refuse(self, error: RequestError) -> None:
        """Answer without the application, and close. What it still sends is dropped."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            content = json.dumps(error_body(error)).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(content))),
                ("connection", "close"),
            ]
            reply = h11.Response(status_code=error.status, headers=headers)
            for event in (reply, h11.Data(data=content), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def allow_connections() -> None:
    """Raise this process's limit of open files, often 1,024, to what the connections need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = MAX_CONNECTIONS + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def server_config(app: ASGIApp, keep_alive: int, grace: float) -> uvicorn.Config:
    """keep_alive: seconds that an idle connection stays open. grace: see `serve.__main__`."""
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_level="error",
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=keep_alive,
        timeout_graceful_shutdown=int(grace) + 5,
    )
