"""The HTTP connections: uvicorn's protocol with time limits, and errors in JSON.

A client that does not finish its headers, or does not read its response, is cut off; without that
a few hundred slow sockets occupy the server. At the limit of connections a new one takes the place
of the one that has waited for its client longest: between requests, for the rest of a request, or
for its client to read. A connection whose request is being served is never closed for another; if
there are only such ones, the new one is refused.
"""

import asyncio
import functools
import json
import resource
import socket
import struct
import sys
from typing import Any

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
    """One connection. waiting: those of the server that wait for their clients, oldest first. most:
    connections of the server."""

    _header_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _receives = False
    """Whether a part of the next request has arrived."""

    def __init__(
        self, *arguments: Any, waiting: "dict[Connection, None]", most: int, **more: Any
    ) -> None:
        super().__init__(*arguments, **more)
        self._waiting = waiting
        self._most = most

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # otherwise the kernel takes megabytes for a client that reads nothing
        own = transport.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        is_full = len(self.connections) > min(self._most, MAX_CONNECTIONS)
        if is_full and not self._waiting:
            self._refuse(_too_many())
            return
        if is_full:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest._make_room()
        self._watch_headers()
        self._note_turn()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._header_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        self._stall_timer = None
        self._waiting.pop(self, None)
        super().connection_lost(exc)
        # uvicorn keeps the timer, and so this object, if the client has reset the connection
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        if not self._receives and not self._in_request:
            self._receives = True
            self._waiting.pop(self, None)  # it waits from now on, but not anew for every byte
        super().data_received(data)
        self._watch_headers()
        self._note_turn()

    def on_response_complete(self) -> None:
        self._receives = False
        super().on_response_complete()
        if self.conn.trailing_data[0]:
            self._watch_headers()
        self._note_turn()

    @property
    def _in_request(self) -> bool:
        """Whether the headers of a request have arrived, and not all of its response is sent."""
        return self.cycle is not None and not self.cycle.response_complete

    def _note_turn(self) -> None:
        """Record whether it is the client's turn: to send, or to read."""
        sends = not self._in_request or self.conn.their_state is h11.SEND_BODY
        if self.transport.is_closing() or not (sends or self._stall_timer is not None):
            self._waiting.pop(self, None)
        else:
            self._waiting.setdefault(self, None)

    def _make_room(self) -> None:
        """End this connection, which waits for its client, for another one."""
        if self._stall_timer is not None:
            self._cut_off()
        elif self._receives or self._in_request:
            self._refuse(_too_many())
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(STALL_SECONDS, self._cut_off)
        self._note_turn()

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
            self._stall_timer = None
        self._note_turn()

    def send_400_response(self, msg: str) -> None:
        """Called for a request that is not HTTP, inside the handler of the library's error."""
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        if status == 431:
            error = RequestError("the headers are too large", None, 431, "headers_too_large")
        else:
            error = RequestError("this is not a valid HTTP request", None, 400, "invalid_http")
        self._refuse(error)

    def _watch_headers(self) -> None:
        in_request = self._in_request
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


def _too_many() -> RequestError:
    return RequestError("too many connections", None, 503, "overloaded")


def allow_connections() -> int:
    """Raise this process's limit of open files, often 1,024, to what the connections need. Returns
    how many connections it has files for: at most half of a small limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = MAX_CONNECTIONS + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        soft = needed
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, max(soft - _OTHER_FILES, soft // 2))


def server_config(
    app: ASGIApp, keep_alive: int, grace: float, most: int = MAX_CONNECTIONS
) -> uvicorn.Config:
    """keep_alive: seconds that an idle connection stays open. grace: see `serve.server`. most:
    connections at the same time."""
    protocol: Any = functools.partial(Connection, waiting={}, most=most)
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        log_level="error",
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=keep_alive,
        timeout_graceful_shutdown=int(grace) + 5,
    )
