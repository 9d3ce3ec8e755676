"""`python -m serve FOLDER`: an exported model over HTTP, OpenAI-compatible."""

import argparse
import asyncio
import socket
from collections.abc import Sequence
from types import FrameType

import uvicorn

from configs.errors import UserError
from parallel.launch_environment import read_launch_environment
from serve.api.app import build_app
from serve.api.http_server import allow_connections, server_config
from serve.api.limits import Drain
from serve.engine.core import EngineCore, EngineOptions
from serve.engine.input_processor import EngineInfo
from serve.engine.rank_group import RankGroup, connect, handle_signals
from serve.frontend.chat import read_chat_template
from serve.frontend.client import EngineClient
from serve.frontend.engine_process import EngineProcess
from serve.frontend.follow import follow, open_together
from serve.frontend.thread import EngineThread
from serve.options import engine_options, make_parser
from serve.tool_calls.forms import FORMS

_AFTER_GRACE = 1.0
"""Seconds after which connections whose response is not read are closed."""


class _Server(uvicorn.Server):
    """Refuses new work at the first signal, and stops at once at the second.

    uvicorn then accepts no new connections and waits for the open ones; after the grace period,
    stopping the engine ends their requests with an error, instead of a dropped connection.
    """

    def __init__(
        self, config: uvicorn.Config, drain: Drain, engine: EngineClient, grace: float
    ) -> None:
        super().__init__(config)
        self.drain = drain
        self.engine = engine
        self.grace = grace
        self.repeat_forces = True
        """Whether a second signal ends the open connections at once. A launcher sends each signal
        again."""
        self._signaled = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # it leaves out this end
            await self.lifespan.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        first, self._signaled = not self._signaled, True  # the next may interrupt this call
        if not first and not self.repeat_forces:
            return
        super().handle_exit(sig, frame)
        if not first:
            self.force_exit = True
            self.engine.stop(wait=False)
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        assert self._loop is not None
        self.drain.start()
        self._loop.call_later(self.grace, self.engine.stop, False)
        self._loop.call_later(self.grace + _AFTER_GRACE, self._close_connections)

    def _close_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


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
    parser.add_argument(
        "--keep-alive",
        type=int,
        default=620,
        help="seconds that an idle connection stays open; more than the proxy in front",
    )
    parser.add_argument(
        "--engine-process",
        choices=["on", "off"],
        default="off",
        help="on: the engine is a process of its own, which is started again when it ends",
    )
    parser.add_argument(
        "--tool-call-format",
        choices=["auto", *FORMS],
        default="auto",
        help="how the model writes calls of tools; auto: as its chat template does",
    )
    parser.add_argument(
        "--api-key", help="clients must send it, on every path but /health and the page at /"
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.port <= 65535:
        raise UserError(f"--port {options.port}: must lie between 0 and 65535")
    if not 0 <= options.grace <= 3600:
        raise UserError(f"--grace {options.grace}: must lie between 0 and 3600 seconds")
    if not 1 <= options.keep_alive <= 86400:
        raise UserError(f"--keep-alive {options.keep_alive}: must lie between 1 and 86400 seconds")
    if options.api_key is not None and not (options.api_key.isascii() and options.api_key.strip()):
        raise UserError("--api-key: must be of ASCII characters, and not empty")
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


def describe(info: EngineInfo) -> str:
    """What the engine has, in one line."""
    ranks = f"{info.ranks}; each rank: " if info.ranks else ""
    return f"{info.dtype} on {info.device}; {ranks}KV cache {info.cache}"


def _open_engine(
    options: argparse.Namespace, sizes: EngineOptions, group: RankGroup | None
) -> EngineClient:
    if options.engine_process == "on":
        if group is not None:
            raise UserError("--engine-process on: works with one rank; leave it out")
        return EngineProcess(options.folder, options.dtype, options.device, sizes)
    export = open_together(options.folder, options.dtype, options.device, sizes, group)
    return EngineThread(EngineCore(export, sizes))


def _serve(
    options: argparse.Namespace,
    sizes: EngineOptions,
    group: RankGroup | None,
    listener: socket.socket,
) -> None:
    template = read_chat_template(options.folder)
    engine = _open_engine(options, sizes, group)
    info = engine.inputs.info
    name = options.model_name or info.name
    if not name.isprintable():
        engine.stop()
        raise UserError("--model-name: must be printable; the default is the name of the folder")
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"{host}:{listener.getsockname()[1]}"
    drain = Drain()
    app = build_app(
        engine,
        name,
        lambda: print(f"serving {name} on http://{address}/v1 ({describe(info)})", flush=True),
        drain=drain,
        api_key=options.api_key,
        template=template,
        model_path=str(options.folder),
        tool_call_format=options.tool_call_format,
    )
    config = server_config(app, options.keep_alive, options.grace, allow_connections())
    server = _Server(config, drain, engine, options.grace)
    server.repeat_forces = group is None and not read_launch_environment().is_launched
    # uvicorn raises the signals it caught again when it is done; they have had their effect by then
    handle_signals(lambda *_: None)
    server.run(sockets=[listener])
    if group is not None:
        engine.stop()  # however the server ended: it ends the other ranks
