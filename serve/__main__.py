"""`python -m serve FOLDER`: serve an exported model over HTTP, OpenAI-compatible.

`torchrun --nproc-per-node 2 -m serve FOLDER --tp 2 --ep 2` divides the model among two ranks.
`python -m serve generate FOLDER --prompt TEXT` prints the completion on the terminal instead.
"""

import argparse
import functools
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn

from configs.errors import UserError
from parallel.launch_environment import fail, read_launch_environment
from serve.api.app import MAX_HEADER_BYTES, build_app
from serve.engine.core import EngineCore, EngineOptions
from serve.engine.rank_group import RankGroup, connect, handle_signals
from serve.engine.sampling_params import RequestError
from serve.frontend.follow import follow, open_together
from serve.frontend.thread import EngineThread
from serve.generate import generate
from serve.generate import parse as parse_generate
from serve.options import engine_options, make_parser

MAX_CONNECTIONS = 2048
"""Further connections are answered with 503 at once."""


class _Server(uvicorn.Server):
    """Calls `on_exit` at the first signal.

    uvicorn then accepts no new connections and waits for the open ones; after the grace period,
    stopping the engine ends their requests with an error, instead of a dropped connection.
    """

    on_exit: Callable[[], None]
    repeat_forces: bool = True
    """Whether a second signal ends the open connections at once. A launcher sends each signal
    again."""
    _signalled: bool = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        first, self._signalled = not self._signalled, True  # the next may interrupt this call
        if first:
            self.on_exit()
        elif not self.repeat_forces:
            return
        super().handle_exit(sig, frame)


def _stop_later(thread: EngineThread, seconds: float) -> None:
    timer = threading.Timer(seconds, thread.stop, [False])
    timer.daemon = True  # the process need not wait for it if all requests finish earlier
    timer.start()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises UserError if it is invalid."""
    parser = make_parser("serve", "Serve an exported model over HTTP, OpenAI-compatible.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--model-name", help="default: the folder's name")
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
    """A listening socket, created before the model is read, so that a used port is found at
    once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; try another --port"
        ) from None
    # connections inherit it; without it the first token of a stream waits 40 ms after the
    # headers, until the client's delayed acknowledgement (asyncio sets it for its own sockets)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def serve(options: argparse.Namespace) -> None:
    """Serve until Ctrl-C or SIGTERM. Of several ranks the first listens, and the others compute."""
    sizes = engine_options(options)
    group = connect(options.folder, options.tp, options.ep, options.device)
    if group is None:
        _serve(options, sizes, None, listen(options.host, options.port))
        return
    listeners = []
    group.ranks.on_first(lambda: listeners.append(listen(options.host, options.port)))
    if group.ranks.is_first:
        _serve(options, sizes, group, listeners[0])
    else:
        follow(open_together(options.folder, options.dtype, options.device, sizes, group), sizes)
    group.leave()


def _serve(
    options: argparse.Namespace,
    sizes: EngineOptions,
    group: RankGroup | None,
    listener: socket.socket,
) -> None:
    export = open_together(options.folder, options.dtype, options.device, sizes, group)
    core = EngineCore(export, sizes)
    name = options.model_name or export.name
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"{host}:{listener.getsockname()[1]}"

    def announce() -> None:
        kind = str(export.dtype).removeprefix("torch.")
        print(
            f"serving {name} on http://{address}/v1 ({kind} on {export.device}; "
            f"{'' if group is None else f'{group}; each rank: '}KV cache {core.cache.describe()})",
            flush=True,
        )

    thread = EngineThread(core)
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
    server.repeat_forces = group is None
    server.on_exit = functools.partial(_stop_later, thread, options.grace)
    # uvicorn raises the signals it caught again when it is done; they have had their effect by then
    handle_signals(lambda *_: None)
    server.run(sockets=[listener])
    if group is not None:
        thread.stop()  # however the server ended: it ends the other ranks


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 after a stop, 2 with one line on stderr for an error of the user."""
    rank = 0
    try:
        rank = read_launch_environment().rank
        if arguments[:1] == ["generate"]:
            generate(parse_generate(arguments[1:]))
        else:
            serve(parse(arguments))
    except (UserError, RequestError) as error:
        return fail(rank, f"error: {error}", 2)
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
