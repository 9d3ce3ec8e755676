"""`python -m scripts.bench_serve EXPORT`: the server under load, compared with others.

    python -m scripts.bench_serve EXPORT --peer vllm=http://127.0.0.1:8001/v1 --rounds 3

Our server is started here; a peer is any running server of OpenAI completions (vLLM, llama-server,
...). Rounds alternate between the servers, so that other load on the machine affects all; the best
round of each is shown, and the ratio of its throughput to ours.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from configs.command_line import CommandParser
from configs.errors import UserError
from scripts.bench_serve.client import Answer, run
from scripts.bench_serve.workloads import NAMES, build


def percentiles(values: list[float]) -> str:
    """Median, 90 and 99 percent in milliseconds."""
    if not values:
        return "-"
    ranked = sorted(values)
    at = (ranked[min(int(len(ranked) * q), len(ranked) - 1)] for q in (0.5, 0.9, 0.99))
    return " / ".join(f"{1e3 * value:.1f}" for value in at)


def row(name: str, seconds: float, answers: list[Answer]) -> dict[str, object]:
    """The results of one run of a workload on one server."""
    total_in = sum(answer.prompt_tokens for answer in answers)
    gaps = [b - a for x in answers for a, b in zip(x.pieces, x.pieces[1:], strict=False)]
    per_token = [
        (x.pieces[-1] - x.pieces[0]) / (x.output_tokens - 1)
        for x in answers if len(x.pieces) > 1 and x.output_tokens > 1
    ]  # fmt: skip
    return {
        "server": name,
        "out tok/s": round(sum(answer.output_tokens for answer in answers) / seconds, 1),
        "in tok/s": round(total_in / seconds, 1),
        "TTFT ms p50/p90/p99": percentiles([x.pieces[0] - x.asked for x in answers]),
        "TPOT ms p50/p90/p99": percentiles(per_token),
        "ITL ms p50/p90/p99": percentiles(gaps),
        "hit rate": round(sum(x.cached_tokens for x in answers) / max(total_in, 1), 3),
    }


def measure(
    servers: dict[str, tuple[str, str]], name: str, clients: int, vocab: int, rounds: int
) -> list[dict[str, object]]:
    """The best round of every server (URL and model name), rounds interleaved. Every round has
    different prompts, so that none is in a cache from an earlier round."""
    best: dict[str, tuple[float, dict[str, object]]] = {}
    for seed in range(rounds):
        workload = build(name, clients, vocab, seed)
        for server, (url, model) in servers.items():
            seconds, answers = asyncio.run(run(url, model, workload))
            rate = sum(answer.output_tokens for answer in answers) / seconds
            if server not in best or rate > best[server][0]:
                best[server] = rate, row(server, seconds, answers)
    label: dict[str, object] = {"workload": name, "clients": clients}
    ours = best["ours"][0]
    return [label | found | {"ours / it": round(ours / rate, 2)} for rate, found in best.values()]


def table(results: list[dict[str, object]]) -> str:
    """Markdown."""
    heads = list(results[0])
    lines = [heads, ["---"] * len(heads), *([str(r[head]) for head in heads] for r in results)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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


def start(export: Path, threads: int, max_running: int) -> tuple[subprocess.Popen[str], str]:
    """Start our server; returns it and its URL. Raises UserError if it does not start."""
    process = subprocess.Popen(
        [
            sys.executable, "-m", "serve", str(export), "--port", "0", "--model-name", "bench",
            "--max-running", str(max_running),
        ],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    if " on http" not in line:
        process.wait()
        raise UserError(f"{export}: the server did not start: {line.strip() or 'see above'}")
    return process, line.split(" on ")[1].split()[0]


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(
        prog="python -m scripts.bench_serve", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("export", type=Path)
    parser.add_argument("--workloads", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--peer-model", help="what peers call the model; default: its folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="folder for results.md and results.png")
    options = parser.parse_args(arguments)
    if any("=" not in peer for peer in options.peer):
        parser.error("--peer: must be NAME=URL, such as vllm=http://127.0.0.1:8001/v1")
    return options


def main(arguments: list[str]) -> int:
    """Exit status 0, or 2 with one line for an error of the user."""
    options = parse(arguments)
    try:
        vocab = int(json.loads((options.export / "config.json").read_text())["vocab_size"])
        process, url = start(options.export, options.threads, max(options.clients))
    except (UserError, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    peers = dict(peer.split("=", 1) for peer in options.peer)
    model = options.peer_model or str(options.export)
    servers = {"ours": (url, "bench")} | {name: (at, model) for name, at in peers.items()}
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {options.threads} threads")
    results = []
    try:
        for name in options.workloads:
            for clients in options.clients if name == "random" else [min(8, max(options.clients))]:
                results += measure(servers, name, clients, vocab, options.rounds)
                print(json.dumps(results[-len(servers) :]), flush=True)
    except (OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        process.terminate()
        process.wait()
    print(table(results))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.md").write_text(table(results) + "\n")
        draw(results, options.out / "results.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
