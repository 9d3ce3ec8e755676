"""Relays between a router and our servers, which record what the router sends where."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


class Relay:
    """Relays requests to `target`, one per connection."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._target = parts.hostname, parts.port
        self.url = ""
        self.bodies: list[bytes] = []
        """Of the requests that generate text."""
        self.statuses: Counter[tuple[str, int]] = Counter()
        """Of (method and path, status)."""

    async def listen(self) -> asyncio.Server:
        """Start; the caller closes it."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            await self._relay(reader, writer)
        writer.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].split(b"\r\n")
        headers = {line.split(b":", 1)[0].strip().lower(): line for line in lines}
        length = int(headers.get(b"content-length", b":0").split(b":", 1)[1])
        body = await reader.readexactly(length)
        headers[b"connection"] = b"connection: close"
        back, forth = await asyncio.open_connection(*self._target)
        try:
            forth.write(b"\r\n".join([first, *headers.values(), b"", body]))
            status = await back.readline()
            if not status:  # the server was killed
                return
            name = b" ".join(first.split()[:2]).decode().partition("?")[0]
            self.statuses[name, int(status.split()[1])] += 1
            if name.startswith("POST") and b"max_" in body:
                self.bodies.append(body)
            writer.write(status)
            while data := await back.read(1 << 16):
                writer.write(data)
                await writer.drain()
        finally:
            forth.close()


@contextmanager
def relays(targets: Sequence[str]) -> Iterator[list[Relay]]:
    """A relay to each server, in a thread, while the context lasts."""
    made = [Relay(target) for target in targets]
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        for relay in made:
            asyncio.run_coroutine_threadsafe(relay.listen(), loop).result(10)
        yield made
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
