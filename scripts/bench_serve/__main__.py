"""`python -m scripts.bench_serve EXPORT`: the server under load, compared with others.

    python -m scripts.bench_serve EXPORT --peers naive,vllm,llama-server --out results

All servers are started here, with the same threads and limits: ours, ours without RadixAttention
(`naive`), `vllm` (also `vllm-eager`) and `llama-server` if they are in PATH. NAME=URL is a server
that runs already and calls the model by --peer-model. Rounds alternate between the servers, so that
other load on the machine affects all; the best round of each is shown, and the ratio of ours to it:
of output tokens/s, and of median times to the first token (above 1: ours is better).
transformers is compared in process, by `scripts.bench_serve.engine`: its server refuses ignore_eos.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from configs.command_line import CommandParser
from configs.errors import UserError
from scripts.bench_serve.servers import PEERS, Load, Server, start
from serve.bench.client import Answer, run
from serve.bench.report import measured, table
from serve.bench.workloads import MAX_LENGTH, NAMES, build
from train.report.environment import cpu_name

_PAUSE_S = 0.5
"""Between two servers: threads of OpenMP spin for a while after their last work."""


def row(name: str, seconds: float, answers: list[Answer]) -> dict[str, object]:
    """The results of one run of a workload on one server."""
    return {"server": name} | measured(seconds, answers)


def measure(
    servers: dict[str, Server], name: str, clients: int, vocab: int, rounds: int
) -> list[dict[str, object]]:
    """The best round of every server, rounds interleaved. Every round and number of clients has
    other prompts, so that none is in a cache from before."""
    best: dict[str, tuple[float, float, dict[str, object]]] = {}
    for seed in range(rounds):
        workload = build(name, clients, vocab, seed)
        for label, server in servers.items():
            seconds, answers = asyncio.run(run(server.url, server.model, workload))
            rate = sum(answer.output_tokens for answer in answers) / seconds
            if label not in best or rate > best[label][0]:
                first = statistics.median(x.pieces[0] - x.asked for x in answers)
                best[label] = rate, first, row(label, seconds, answers)
            time.sleep(_PAUSE_S)
    label_row: dict[str, object] = {"workload": name, "clients": clients}
    ours, ours_first, _ = best["ours"]
    return [
        label_row | found | {
            "ours / it": round(ours / rate, 2), "its TTFT / ours": round(first / ours_first, 2)
        }
        for rate, first, found in best.values()
    ]  # fmt: skip


def draw(results: list[dict[str, object]], path: Path) -> None:
    """Output tokens per second of every server, by workload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    places = list(dict.fromkeys(f"{r['workload']}, {r['clients']}" for r in results))
    servers = list(dict.fromkeys(str(r["server"]) for r in results))
    figure, axes = pyplot.subplots(figsize=(8, 0.5 + 0.5 * len(places)), layout="constrained")
    for i, server in enumerate(servers):
        own = {f"{r['workload']}, {r['clients']}": r for r in results if r["server"] == server}
        heights = [p + (i - len(servers) / 2) * 0.8 / len(servers) for p in range(len(places))]
        rates = [float(str(own[place]["out tok/s"])) for place in places]
        axes.barh(heights, rates, 0.8 / len(servers), align="edge", label=server)
    axes.set_yticks(range(len(places)), places)
    axes.invert_yaxis()
    axes.set_xlabel("output tokens/s")
    axes.legend()
    figure.savefig(path)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(
        prog="python -m scripts.bench_serve", description=__doc__,
    )  # fmt: skip
    parser.add_argument("export", type=Path)
    parser.add_argument("--workloads", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument(
        "--peers", type=lambda text: text.split(","), default=[], metavar="NAME,NAME=URL,...",
        help=f"{', '.join(PEERS)}, or running servers",
    )  # fmt: skip
    parser.add_argument(
        "--peer-model", help="what running servers call the model; default: the folder's name"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="folder for results.md and results.png")
    options = parser.parse_args(arguments)
    for peer in options.peers:
        name, _, url = peer.partition("=")
        if not (url.startswith("http://") or peer in PEERS) or name == "ours":
            parser.error(f"--peers {peer}: must be {', '.join(PEERS)}, or NAME=http://...")
    return options


def main(arguments: list[str]) -> int:
    """Exit status 0, or 2 with one line for an error of the user."""
    options = parse(arguments)
    results: list[dict[str, object]] = []
    try:
        config = json.loads((options.export / "config.json").read_text())
        vocab, length = int(config["vocab_size"]), int(config["max_position_embeddings"])
        load = Load(options.threads, max(options.clients), min(length, MAX_LENGTH))
        with ExitStack() as running:
            folder = Path(running.enter_context(tempfile.TemporaryDirectory()))
            servers = {}
            for peer in ("ours", *options.peers):
                name, _, url = peer.partition("=")
                model = options.peer_model or options.export.resolve().name
                servers[name] = (
                    Server(url, model) if url else start(name, options.export, load, folder)
                )
                running.callback(servers[name].stop)
            print(
                f"{time.strftime('%Y-%m-%d')}, {cpu_name()}, {os.cpu_count()} cores, "
                f"{options.threads} threads",
                flush=True,
            )
            for name in options.workloads:
                for clients in options.clients if name == "random" else [min(8, load.max_running)]:
                    results += measure(servers, name, clients, vocab, options.rounds)
                    print(table(results[-len(servers) :]), flush=True)
    except (UserError, OSError, RuntimeError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(results))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.md").write_text(table(results) + "\n")
        draw(results, options.out / "results.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
