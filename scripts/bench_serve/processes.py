"""`python -m scripts.bench_serve.processes EXPORT`: one process, or the engine in a second one.

Both servers run; rounds alternate between them, so that other load on the machine affects both.
Every round has other prompts. Printed are the medians over the rounds, of the server with
`--engine-process on` relative to the one with `off`: output tokens per second (above 1: faster),
times to the first token and between tokens (below 1: faster), and CPU seconds of all processes of
the server per output token.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from configs.command_line import CommandParser
from configs.errors import UserError
from scripts.bench_serve.servers import Load, Server, start
from serve.bench.client import Answer, run
from serve.bench.report import table
from serve.bench.workloads import MAX_LENGTH, NAMES, build
from train.report.environment import cpu_name

MODES = {"off": "one-process", "on": "engine-process"}
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its running descendants."""
    times: dict[int, tuple[int, float]] = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = place.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        times[int(place.parent.name)] = int(words[1]), (int(words[11]) + int(words[12])) / _TICKS

    def total(one: int) -> float:
        children = (child for child, (parent, _) in times.items() if parent == one)
        return times[one][1] + sum(map(total, children))

    return total(pid)


def measure(server: Server, workload: str, clients: int, vocab: int, seed: int) -> dict[str, float]:
    """One round of one server."""
    assert server.process is not None
    before = cpu_seconds(server.process.pid)
    seconds, answers = asyncio.run(
        run(server.url, server.model, build(workload, clients, vocab, seed))
    )
    used = cpu_seconds(server.process.pid) - before
    n_tokens = sum(answer.output_tokens for answer in answers)
    return {
        "out tok/s": n_tokens / seconds,
        "TTFT ms": 1e3 * statistics.median(x.pieces[0] - x.asked for x in answers),
        "ITL ms": 1e3 * statistics.median(gaps(answers)),
        "CPU ms per token": 1e3 * used / n_tokens,
    }


def gaps(answers: Sequence[Answer]) -> list[float]:
    """Seconds between the pieces of each answer."""
    return [b - a for x in answers for a, b in zip(x.pieces, x.pieces[1:], strict=False)]


def compare(
    servers: dict[str, Server], workload: str, clients: int, vocab: int, rounds: int
) -> dict[str, object]:
    """A row: what one process has, and the median of the rounds' ratios."""
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in servers}
    for seed in range(rounds):
        order = list(servers) if seed % 2 == 0 else list(servers)[::-1]
        for mode in order:
            found[mode].append(measure(servers[mode], workload, clients, vocab, seed))
    row: dict[str, object] = {"workload": workload, "clients": clients}
    for name in found["off"][0]:
        off, on = ([one[name] for one in found[mode]] for mode in ("off", "on"))
        row[f"{name}, one process"] = round(statistics.median(off), 2)
        ratios = [b / a for a, b in zip(off, on, strict=True)]
        row[f"two / one: {name}"] = round(statistics.median(ratios), 3)
    return row


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises UserError if it is invalid."""
    parser = CommandParser(prog="python -m scripts.bench_serve.processes", description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("--workloads", nargs="+", choices=NAMES, default=["random"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
    if min(options.clients) < 1:
        raise UserError("--clients: must be at least 1")
    return options


def main(arguments: Sequence[str]) -> int:
    """Exit status 0, or 2 with one line for an error of the user."""
    try:
        options = parse(arguments)
        config = json.loads((options.export / "config.json").read_text())
        vocab, length = int(config["vocab_size"]), int(config["max_position_embeddings"])
        load = Load(options.threads, max(options.clients), min(length, MAX_LENGTH))
        with ExitStack() as running:
            folder = Path(running.enter_context(tempfile.TemporaryDirectory()))
            servers = {}
            for mode, name in MODES.items():
                servers[mode] = start(name, options.export, load, folder)
                running.callback(servers[mode].stop)
            print(
                f"{time.strftime('%Y-%m-%d')}, {cpu_name()}, {os.cpu_count()} cores, "
                f"{options.threads} threads",
                flush=True,
            )
            rows = [
                compare(servers, workload, clients, vocab, options.rounds)
                for workload in options.workloads
                for clients in options.clients
            ]
    except (UserError, OSError, RuntimeError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
