"""Messages between a rank and its writer process: JSON and raw bytes over a pipe.

A message is 8 bytes with the length of its header (little-endian), the header (JSON), and the
frames whose lengths the header lists under `frames`.
"""

import json
from typing import IO, Any


def send(pipe: IO[bytes], header: dict[str, Any], *frames: bytes) -> None:
    """Write one message."""
    text = json.dumps(header | {"frames": [len(frame) for frame in frames]}).encode()
    pipe.write(len(text).to_bytes(8, "little") + text)
    for frame in frames:
        pipe.write(frame)
    pipe.flush()


def receive(pipe: IO[bytes]) -> tuple[dict[str, Any], list[bytes]] | None:
    """Read one message; None at the end of the pipe."""
    size = pipe.read(8)
    if len(size) < 8:
        return None
    text = pipe.read(int.from_bytes(size, "little"))
    try:
        header = json.loads(text)
    except ValueError:  # the sender was killed within the message
        return None
    frames = [pipe.read(n) for n in header.pop("frames")]
    return header, frames
