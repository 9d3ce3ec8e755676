"""Messages between the engine and the processes of grammars: JSON and bytes over a Unix socket."""

import json
import socket
from typing import Any

_MOST_AT_ONCE = 1 << 16


def send(connection: socket.socket, content: Any, body: bytes = b"") -> None:
    """Raises OSError if the other side is gone."""
    head = json.dumps(content, separators=(",", ":")).encode()
    sizes = len(head).to_bytes(4, "big") + len(body).to_bytes(4, "big")
    connection.sendall(sizes + head + body)


def receive(connection: socket.socket) -> tuple[Any, bytes]:
    """Raises EOFError if the other side is gone, OSError after the socket's timeout.

    Both sides send in turn, so nothing follows a message before it is answered.
    """
    found = connection.recv(_MOST_AT_ONCE)
    if len(found) < 8:
        found += _read(connection, 8 - len(found))
    n_head, n_body = int.from_bytes(found[:4], "big"), int.from_bytes(found[4:8], "big")
    missing = 8 + n_head + n_body - len(found)
    if missing:
        found += _read(connection, missing)
    return json.loads(found[8 : 8 + n_head]), found[8 + n_head :]


def _read(connection: socket.socket, n_bytes: int) -> bytes:
    found = bytearray()
    while len(found) < n_bytes:
        part = connection.recv(min(n_bytes - len(found), _MOST_AT_ONCE))
        if not part:
            raise EOFError
        found += part
    return bytes(found)
