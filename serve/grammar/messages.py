"""Messages between the engine and the processes of grammars, over a Unix socket.

A compilation is a message of JSON and bytes. The matchers get one of integers in every step, which
costs less to write and to read.
"""

import json
import socket
from array import array
from collections.abc import Sequence
from typing import Any

MAX_ITEMS = 256
"""Outputs in one message to the matchers."""
OPEN, FINISHED, FAILED = range(3)
"""What a matcher answers of an output: it continues, nothing can follow, or it has an error."""
_MOST_AT_ONCE = 1 << 16


def send(connection: socket.socket, content: Any, body: bytes = b"") -> None:
    """Raises OSError if the other side is gone."""
    _send(connection, json.dumps(content, separators=(",", ":")).encode(), body)


def send_numbers(connection: socket.socket, numbers: Sequence[int], body: bytes = b"") -> None:
    """The same for integers of 64 bits."""
    _send(connection, array("q", numbers).tobytes(), body)


def _send(connection: socket.socket, head: bytes, body: bytes) -> None:
    sizes = len(head).to_bytes(4, "big") + len(body).to_bytes(4, "big")
    connection.sendall(sizes + head + body)


def receive(connection: socket.socket) -> tuple[Any, bytes]:
    """Raises EOFError if the other side is gone, OSError after the socket's timeout.

    Both sides send in turn, so nothing follows a message before it is answered.
    """
    head, body = _receive(connection)
    return json.loads(head), body


def receive_numbers(connection: socket.socket) -> tuple[list[int], bytes]:
    """The same for integers of 64 bits."""
    head, body = _receive(connection)
    return array("q", head).tolist(), body


def _receive(connection: socket.socket) -> tuple[bytes, bytes]:
    found = connection.recv(_MOST_AT_ONCE)
    if len(found) < 8:
        found += _read(connection, 8 - len(found))
    n_head, n_body = int.from_bytes(found[:4], "big"), int.from_bytes(found[4:8], "big")
    missing = 8 + n_head + n_body - len(found)
    if missing:
        found += _read(connection, missing)
    return found[8 : 8 + n_head], found[8 + n_head :]


def _read(connection: socket.socket, n_bytes: int) -> bytes:
    found = bytearray()
    while len(found) < n_bytes:
        part = connection.recv(min(n_bytes - len(found), _MOST_AT_ONCE))
        if not part:
            raise EOFError
        found += part
    return bytes(found)
