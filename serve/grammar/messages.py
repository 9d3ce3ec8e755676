"""Messages between the engine and the processes of grammars: JSON and bytes over a Unix socket."""

import json
import socket
from typing import Any


def send(connection: socket.socket, content: Any, body: bytes = b"") -> None:
    """Raises OSError if the other side is gone."""
    head = json.dumps(content, separators=(",", ":")).encode()
    sizes = len(head).to_bytes(4, "big") + len(body).to_bytes(4, "big")
    connection.sendall(sizes + head + body)


def receive(connection: socket.socket) -> tuple[Any, bytes]:
    """Raises EOFError if the other side is gone, OSError after the socket's timeout."""
    sizes = _read(connection, 8)
    n_head, n_body = int.from_bytes(sizes[:4], "big"), int.from_bytes(sizes[4:], "big")
    content = _read(connection, n_head + n_body)
    return json.loads(bytes(content[:n_head])), bytes(content[n_head:])


def _read(connection: socket.socket, n_bytes: int) -> memoryview:
    found = memoryview(bytearray(n_bytes))
    done = 0
    while done < n_bytes:
        n_new = connection.recv_into(found[done:])
        if not n_new:
            raise EOFError
        done += n_new
    return found
