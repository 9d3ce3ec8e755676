"""`python -m serve bench URL`: load a running server, ours or another, and report its speed."""

import argparse
import asyncio
import json
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from urllib.error import URLError
from urllib.parse import urlsplit

from configs.command_line import CommandParser
from configs.errors import UserError
from serve.bench.client import run
from serve.bench.report import measured, table
from serve.bench.workloads import NAMES, build, longest

_CONNECT_S = 30.0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises UserError if it is invalid."""
    parser = CommandParser(
        prog="python -m serve bench",
        description="Load a running server, and report tokens per second and latencies.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("url", help="such as http://127.0.0.1:8000")
    parser.add_argument("--model", help="default: the first one that the server lists")
    parser.add_argument("--workload", choices=NAMES, default="random")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16], metavar="N")
    parser.add_argument(
        "--vocab", type=int, default=256, help="prompts are random token ids below this number"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other prompts")
    parser.add_argument("--api-key", default="none", help="sent with every request")
    options = parser.parse_args(arguments)
    if not _is_url(options.url):
        raise UserError(f"{options.url}: must be a URL such as http://127.0.0.1:8000")
    if min(options.clients) < 1 or max(options.clients) > 1024:
        raise UserError("--clients: must lie between 1 and 1024")
    if not 4 <= options.vocab <= 1 << 24:
        raise UserError(f"--vocab {options.vocab}: must lie between 4 and {1 << 24}")
    if not (options.api_key.isascii() and options.api_key.isprintable()):
        raise UserError("--api-key: must be of ASCII characters")
    return options


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme == "http" and bool(parts.hostname) and (parts.port or 80) > 0
    except ValueError:  # brackets, or a port that is none
        return False


def bench(options: argparse.Namespace) -> None:
    """Print one row for each number of clients. Raises UserError if the server does not answer as
    it has to."""
    root = options.url.rstrip("/")
    url = root if root.endswith("/v1") else f"{root}/v1"
    try:
        card = _card(url, options)
        rows = []
        for clients in options.clients:
            workload = build(options.workload, clients, options.vocab, options.seed)
            room = card.get("max_model_len")
            if isinstance(room, int) and longest(workload) > room:
                raise UserError(
                    f"--workload {options.workload}: has {longest(workload)} tokens, the model at "
                    f"most {room}"
                )
            found = measured(*asyncio.run(run(url, str(card["id"]), workload, options.api_key)))
            rows.append({"workload": options.workload, "clients": clients} | found)
    except (OSError, HTTPException, RuntimeError, ValueError) as error:
        raise UserError(f"{options.url}: {_reason(error)}") from None
    print(table(rows))


def _reason(error: Exception) -> str:
    """One line: without the number and the wrapper of an error of the operating system."""
    cause = error.reason if isinstance(error, URLError) else error
    if not isinstance(cause, OSError):  # an HTTP status, or a text
        cause = error
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return " ".join(str(cause).split()) or type(cause).__name__


def _card(url: str, options: argparse.Namespace) -> dict[str, object]:
    """What the server reports of the model."""
    request = urllib.request.Request(
        f"{url}/models", headers={"Authorization": f"Bearer {options.api_key}"}
    )
    with urllib.request.urlopen(request, timeout=_CONNECT_S) as answer:
        listed = json.load(answer)
    cards = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(cards, list) or not all(isinstance(c, dict) and "id" in c for c in cards):
        raise UserError(f"{url}/models: is no list of models")
    found = [card for card in cards if options.model in (None, card["id"])]
    if not found:
        raise UserError(f"--model {options.model or ''}: {url}/models does not list it")
    return found[0]
