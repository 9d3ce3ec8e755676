"""`python -m serve FOLDER`: serve an exported model over HTTP, OpenAI-compatible."""

import argparse
import functools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import uvicorn

# read when torch is loaded: OpenMP threads that wait by spinning stall on a shared machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from configs.errors import UserError
from serve.api.app import MAX_HEADER_BYTES, build_app
from serve.api.thread import EngineThread
from serve.engine.engine import Engine, EngineOptions
from serve.engine.loading import open_export

MAX_CONNECTIONS = 2048
"""More are answered with 503 at once."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class _Server(uvicorn.Server):
    """Calls `on_exit` at the first signal.

    uvicorn then takes no new connections and waits for those it has; when the grace is over,
    stopping the engine ends their requests with an error, instead of a torn connection.
    """

    on_exit: Callable[[], None]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            self.on_exit()
        super().handle_exit(sig, frame)


def _stop_later(thread: EngineThread, seconds: float) -> None:
    timer = threading.Timer(seconds, thread.stop, [False])
    timer.daemon = True  # the process need not wait for it when all requests are done before
    timer.start()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. UserError where it makes no sense."""
    sizes = EngineOptions()
    parser = _Parser(
        prog="python -m serve",
        description="Serve an exported model over HTTP, OpenAI-compatible.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="export to serve, such as runs/demo/export")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--model-name", help="default: the folder's name")
    parser.add_argument(
        "--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="auto: that of the export"
    )
    parser.add_argument("--device", default="auto", help="auto: cuda where there is one, or cpu")
    parser.add_argument(
        "--max-running", type=int, default=sizes.max_running, help="requests computed together"
    )
    parser.add_argument(
        "--max-waiting",
        type=int,
        default=sizes.max_waiting,
        help="requests that may wait; more get 503",
    )
    parser.add_argument(
        "--max-batch-tokens",
        type=int,
        default=sizes.max_batch_tokens,
        help="tokens per step; longer prompts are cut into chunks",
    )
    parser.add_argument(
        "--kv-tokens",
        type=int,
        default=sizes.kv_tokens,
        help="capacity of the KV cache; 0: what max-running needs, if it fits",
    )
    parser.add_argument(
        "--page-size", type=int, default=sizes.page_size, help="tokens per page of the KV cache"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=5.0,
        help="seconds that requests under way get to finish after Ctrl-C or SIGTERM",
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.port <= 65535:
        raise UserError(f"--port {options.port}: must lie between 0 and 65535")
    if not 0 <= options.grace <= 3600:
        raise UserError(f"--grace {options.grace}: must lie between 0 and 3600 seconds")
    return options


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, made before the model is read so that a taken port shows at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; try another --port"
        ) from None
    # connections inherit it; without it the first token of a stream waits 40 ms behind the
    # headers, until the client's delayed acknowledgement (asyncio sets it for its own sockets)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def serve(options: argparse.Namespace) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    sizes = EngineOptions(
        max_running=options.max_running,
        max_waiting=options.max_waiting,
        max_batch_tokens=options.max_batch_tokens,
        kv_tokens=options.kv_tokens,
        page_size=options.page_size,
    )
    listener = listen(options.host, options.port)
    export = open_export(options.folder, options.dtype, options.device)
    engine = Engine(export, sizes)
    name = options.model_name or export.name
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"{host}:{listener.getsockname()[1]}"

    def announce() -> None:
        kind = str(export.dtype).removeprefix("torch.")
        print(
            f"serving {name} on http://{address}/v1 ({kind} on {export.device}; "
            f"KV cache {engine.cache.describe()})",
            flush=True,
        )

    thread = EngineThread(engine)
    server = _Server(
        uvicorn.Config(
            build_app(thread, name, announce),
            http="h11",
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=int(options.grace) + 5,
        )
    )
    server.on_exit = functools.partial(_stop_later, thread, options.grace)
    # uvicorn raises the signals it caught once more when it is done; they were obeyed by then
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listener])


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 after a stop, 2 with one line on stderr where something cannot work."""
    try:
        serve(parse(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
