"""`python -m serve FOLDER`: serve an exported model over HTTP, OpenAI-compatible.

`torchrun --nproc-per-node 2 -m serve FOLDER --tp 2 --ep 2` divides the model among two ranks.
`python -m serve generate FOLDER --prompt TEXT` prints the completion on the terminal instead,
`python -m serve chat FOLDER` answers one line after another, and `python -m serve bench URL`
measures a running server.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from configs.errors import UserError
from parallel.launch_environment import fail, read_launch_environment
from serve.engine.sampling_params import RequestError

Parse = Callable[[Sequence[str]], argparse.Namespace]
Run = Callable[[argparse.Namespace], None]


def _command(name: str) -> tuple[Parse, Run]:
    """How a command reads its options and runs; only its own modules are imported."""
    if name == "generate":
        from serve.generate import generate, parse

        return parse, generate
    if name == "chat":
        from serve.terminal_chat import chat, parse

        return parse, chat
    if name == "bench":
        from serve.bench.command import bench, parse

        return parse, bench
    from serve.server import parse, serve

    return parse, serve


@contextmanager
def _interrupt_ends_process() -> Iterator[None]:
    """Within, Ctrl-C ends the process at once: torch reports a KeyboardInterrupt while it imports
    numpy as a warning, and continues."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 after a stop, 2 with one line on stderr for an error of the user."""
    rank = 0
    name = arguments[0] if arguments and arguments[0] in ("generate", "chat", "bench") else ""
    try:
        rank = read_launch_environment().rank
        with _interrupt_ends_process():
            parse, run = _command(name)
        run(parse(arguments[1:] if name else arguments))
    except (UserError, RequestError) as error:
        return fail(rank, f"error: {error}", 2)
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
