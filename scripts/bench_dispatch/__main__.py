"""`python -m scripts.bench_dispatch [--link]`: every dispatcher on 2 and 4 ranks of this machine.

One MoE layer, forward and backward, bf16, on CPUs over gloo. All dispatchers, and torchtitan's, run
alternately within one run, and a ratio is the median over rounds of the ratio within a round, so
that other load on the machine affects all equally. With `--link` the ranks are on two hosts
(network namespaces, needs root) with a link of limited bandwidth and some latency between them. If
the processors are the device, communication and experts compete for them: with `--device-ms` the
experts wait instead of computing, which models a separate accelerator. Prints Markdown;
`--picture FILE.png` draws it.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from configs.command_line import CommandParser
from scripts.bench_dispatch import slow_link

_PORT = "29517"
_SIZES = {"experts": 8, "top_k": 4, "tokens": 2048, "width": 256, "d_expert": 1024, "chunks": 4}


def main() -> None:
    """Measure, print the tables and, if requested, draw them."""
    parser = CommandParser(prog="python -m scripts.bench_dispatch", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="rounds per table (default 15)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="default: 2 4")
    parser.add_argument("--link", action="store_true", help="two hosts with a slow link")
    parser.add_argument("--mbit", type=float, default=300, help="of the link (default 300)")
    parser.add_argument("--delay-ms", type=float, default=1, help="of the link (default 1)")
    parser.add_argument(
        "--device-ms",
        type=float,
        default=0,
        help="experts that take so long forward, twice that backward, and no processor time; "
        "default: experts on the CPU",
    )
    parser.add_argument("--picture", type=Path, help="file for a picture of the tables")
    options = parser.parse_args()
    setting = _SIZES | {"rounds": options.rounds, "link": options.link}
    setting["device_ms"] = options.device_ms
    tables = {}
    for ranks in options.ranks:
        title = f"{ranks} ranks"
        if options.link:
            title += f" on two hosts, {options.mbit:g} Mbit/s, {options.delay_ms:g} ms"
            with slow_link.two_hosts(options.delay_ms, options.mbit) as hosts:
                measured = _run(setting, ranks // 2, hosts)
        else:
            measured = _run(setting, ranks, ("",))
        if options.device_ms:
            title += f", experts of {3 * options.device_ms:g} ms"
        tables[title] = table(measured, ranks, options.link)
        print(f"\n{title}, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}\n")
        print(as_markdown(tables[title]), flush=True)
    if options.picture:
        draw(tables, options.picture)


def _run(setting: dict[str, Any], per_host: int, hosts: tuple[str, ...]) -> dict[str, Any]:
    """Start the ranks, `per_host` in every namespace ("": none), and read the results of rank 0."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    address = "127.0.0.1"
    if len(hosts) > 1:
        env["GLOO_SOCKET_IFNAME"], address = slow_link.INTERFACE, slow_link.ADDRESSES[0]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        processes = []
        for i, host in enumerate(hosts):
            command = ["ip", "netns", "exec", host] if host else []
            command += [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(hosts))]
            command += ["--node-rank", str(i), "--nproc-per-node", str(per_host)]
            command += ["--master-addr", address, "--master-port", _PORT]
            command += ["-m", "scripts.bench_dispatch.ranks", str(out), json.dumps(setting)]
            processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
        for process in processes:
            _, errors = process.communicate()
            if process.returncode:
                sys.exit(errors)
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def table(measured: dict[str, Any], ranks: int, link: bool) -> list[dict[str, Any]]:
    """A row per dispatcher; times in ms, bytes in MiB of all ranks. `hidden` is the share of the
    time that all_to_all exposes and an overlapped dispatcher does not; without a slow link that
    time is too short to measure."""
    times = {name: [t for t, _ in pairs] for name, pairs in measured["times"].items()}
    busy = {name: [b for _, b in pairs] for name, pairs in measured["times"].items()}
    rows_per_step = _SIZES["tokens"] * _SIZES["top_k"] * ranks
    plain = _difference(times["all_to_all"], times["local"])
    rows = []
    for name, seconds in times.items():
        n_bytes, between = measured["bytes"].get(name, (None, None))
        exposed = _difference(seconds, times["local"])
        rows.append(
            {
                "dispatcher": name,
                "rows/s": rows_per_step / statistics.median(seconds),
                "time": statistics.median(seconds) * 1e3,
                "exposed": exposed * 1e3 if name != "local" else None,
                "hidden": 1 - exposed / plain if link and "overlapped" in name else None,
                "MiB": n_bytes / 2**20 if n_bytes is not None else None,
                "MiB between": between / 2**20 if between is not None else None,
                "ratio": _ratio(seconds, times["all_to_all"]),
                "processor": _ratio(busy[name], busy["all_to_all"]),
            }
        )
    return rows


def _difference(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a - b for a, b in zip(ours, theirs, strict=True))


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The table for docs/dispatch.md."""
    lines = [
        "| dispatcher | rows/s | time ms | exposed ms | hidden | MiB sent | between nodes "
        "| time / all_to_all | processor time / all_to_all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shown = [
            row["dispatcher"], f"{row['rows/s']:,.0f}", f"{row['time']:.0f}",
            _number(row["exposed"], ".0f"), _number(row["hidden"], ".0%"),
            _number(row["MiB"], ".1f"), _number(row["MiB between"], ".1f"),
            f"{row['ratio']:.2f}", f"{row['processor']:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def draw(tables: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Bars of time, one panel per table; the dark part is the time of a layer without
    communication."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(tables), figsize=(5.5 * len(tables), 3.2), squeeze=False, layout="constrained"
    )
    for panel, (title, rows) in zip(panels[0], tables.items(), strict=True):
        names = [row["dispatcher"] for row in rows][::-1]
        exposed = [max(row["exposed"] or 0.0, 0.0) for row in rows][::-1]
        times = [row["time"] for row in rows][::-1]
        panel.barh(names, times, color="tab:orange", label="exposed")
        inner = [t - e for t, e in zip(times, exposed, strict=True)]
        panel.barh(names, inner, color="tab:blue", label="local layer")
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("ms, forward and backward")
        panel.grid(axis="x", alpha=0.3)
    panels[0][-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
