"""`python -m scripts.check_clients EXPORT`: clients and routers of other projects on our server.

    python -m scripts.check_clients runs/demo/export --out results

Each client is installed from the package index into a virtual environment of its own (`--venvs`,
kept for the next time) and runs against servers that are started here. Nothing is downloaded from a
model hub: tokenizer and model are those of EXPORT, which needs a chat template. lm-eval also runs
the model itself, with transformers, so EXPORT must be of a family that transformers has.

`--use vllm=PYTHON` takes an environment that exists. Exit status 0: all is as it has to be; 1: a
check has failed; 2: an error of the user.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from configs.command_line import CommandParser
from configs.errors import UserError
from scripts.check_clients import benchmarks, openai_client, routers, scores
from scripts.check_clients.environments import ENVIRONMENTS
from scripts.check_clients.setting import Row, Setting
from serve.bench.report import table
from serve.bench.workloads import MAX_LENGTH
from train.report.environment import cpu_name

CHECKS: dict[str, Callable[[Setting], list[Row]]] = {
    "openai": openai_client.check,
    "sglang-router": routers.check_sglang_router,
    "smg": routers.check_smg,
    "lm-eval": scores.check,
    "genai-bench": benchmarks.check_genai_bench,
    "sglang": benchmarks.check_sglang,
    "aiperf": benchmarks.check_aiperf,
    "vllm": benchmarks.check_vllm,
}
_CACHE = Path.home() / ".cache" / "phalanx" / "clients"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(
        prog="python -m scripts.check_clients", description=__doc__,
    )  # fmt: skip
    parser.add_argument("export", type=Path)
    parser.add_argument("--clients", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--venvs", type=Path, default=_CACHE, help=f"default: {_CACHE}")
    parser.add_argument("--use", nargs="+", default=[], metavar="CLIENT=PYTHON")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="folder for results.json and results.md")
    options = parser.parse_args(arguments)
    for words in options.use:
        name, _, python = words.partition("=")
        if name not in CHECKS or not Path(python).is_file():
            parser.error(f"--use {words}: must be CLIENT=PYTHON, an interpreter that exists")
    return options


def check(name: str, options: argparse.Namespace, max_length: int) -> list[dict[str, object]]:
    """The rows of a client; an error of it is a row, too."""
    environment = ENVIRONMENTS[name]
    given = dict(words.split("=", 1) for words in options.use)
    version = "?"
    try:
        python = (
            Path(given[name]).absolute() if name in given else environment.python(options.venvs)
        )
        version = environment.version(python)
        with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
            export = options.export.resolve()
            setting = Setting(export, python, Path(folder), options.threads, max_length)
            rows = CHECKS[name](setting)
    except (UserError, OSError, ValueError, KeyError) as error:
        rows = [Row("run", f"{type(error).__name__}: {error}", ok=False)]
    client = f"{environment.distribution} {version}"
    return [
        {
            "client": client,
            "check": row.check,
            "result": row.result,
            "ok": "yes" if row.ok else "NO",
        }
        for row in rows
    ]


def main(arguments: list[str]) -> int:
    """Run the checks; returns the exit status."""
    options = parse(arguments)
    try:
        config = json.loads((options.export / "config.json").read_text())
        max_length = min(int(config["max_position_embeddings"]), MAX_LENGTH)
        for needed in ("tokenizer.json", "tokenizer_config.json"):
            if not (options.export / needed).is_file():
                raise UserError(f"{options.export / needed}: missing; clients read the tokenizer")
    except (UserError, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    head = {
        "date": time.strftime("%Y-%m-%d"), "cpu": cpu_name(), "cores": os.cpu_count(),
        "threads": options.threads, "python": platform.python_version(),
        "command": "python -m scripts.check_clients " + " ".join(arguments),
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in head.items()), flush=True)
    results: list[dict[str, object]] = []
    for name in options.clients:
        begin = time.monotonic()
        results += check(name, options, max_length)
        print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "results.json").write_text(
                json.dumps(head | {"rows": results}, indent=1)
            )
            (options.out / "results.md").write_text(table(results) + "\n")
    print(table(results))
    return int(any(row["ok"] != "yes" for row in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
