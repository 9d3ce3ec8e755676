"""`python -m scripts.bench_startup`: how long commands take before they work, and what they import.

- train: seconds until the first step of the demo's experiment is done, its corpus cached,
- serve: seconds until an export (by default that of `make demo`) has answered a request for one
  token,
- every command: seconds of `--help`, and the packages of `HEAVY` that it imports; more than
  `BUDGET` names is an error.

Times are wall and processor seconds, the best of several rounds.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError

from configs.command_line import CommandParser

HEAVY = (
    "torch", "torch._dynamo", "triton", "numpy", "tokenizers", "transformers", "torchtitan",
    "datasets", "matplotlib", "tensorboard", "pandas", "uvicorn", "starlette", "xgrammar",
)  # fmt: skip
"""Packages whose import takes more than 50 ms."""
_TORCH = {"torch", "numpy", "tokenizers"}
_TRAINING = {*_TORCH, "torch._dynamo", "triton"}  # FSDP2 and torch's optimizers import the compiler
BUDGET: dict[str, set[str]] = {
    "train": set(), "serve": {*_TORCH, "uvicorn", "starlette"}, "serve bench": set(),
    "serve chat": _TORCH, "serve.generate": _TORCH, "launch.local": set(), "launch.slurm": set(),
    "launch.kubernetes": set(), "scripts.demo": set(), "scripts.export": _TORCH,
    "scripts.import_hf": _TORCH, "scripts.to_gguf": _TORCH, "scripts.prepare_data": _TORCH,
    "scripts.upcycle": _TORCH, "scripts.validate": _TRAINING, "scripts.scaling_report": _TRAINING,
}  # fmt: skip
"""What the `--help` of each command may import."""


def imports_of(command: str) -> tuple[float, set[str]]:
    """Seconds of a command's `--help`, and the packages of `HEAVY` that it imports."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *command.split(), "--help"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    names = set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.M))
    if done.returncode or not names:
        last = done.stderr.rstrip().rpartition("\n")[2]
        raise SystemExit(f"python -m {command} --help: exit code {done.returncode}: {last}")
    return seconds, {name for name in HEAVY if name in names}


def until_first_step() -> tuple[float, float]:
    """Wall and processor seconds until the trainer prints its first step, on one rank."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "train", "configs/demo.toml", f"--run.dir={folder}", "--train.log_every=1"]
        with _running(command) as process:
            assert process.stdout is not None
            lines = process.stdout
            return _when(process, lambda: re.match(rb"step +1/", lines.readline()) is not None)


def until_first_answer(export: Path, port: int) -> tuple[float, float]:
    """Wall and processor seconds until a server has answered a request for one token."""
    body = {"model": export.name, "prompt": "def", "max_tokens": 1}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip

    def answered() -> bool:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return bool(json.load(answer)["choices"])
        except HTTPError:
            raise
        except OSError:  # it does not listen yet
            time.sleep(0.02)
            return False

    with _running(["-m", "serve", str(export), "--port", str(port)]) as process:
        return _when(process, answered)


@contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _when(process: subprocess.Popen[bytes], happened: Callable[[], bool]) -> tuple[float, float]:
    started = time.perf_counter()
    while not happened():
        if process.poll() is not None:
            raise SystemExit(f"{process.args!r} ended with {process.returncode}")
    wall = time.perf_counter() - started
    words = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return wall, (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    """Print all figures; exit code 1 if a command imports more than its budget."""
    from train.report.environment import cpu_name

    parser = CommandParser(prog="python -m scripts.bench_startup", description=__doc__)
    parser.add_argument("--export", type=Path, default=Path("runs/demo/export"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=18_123)
    options = parser.parse_args()
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores {cpu_name()}")
    if not options.export.is_dir():
        parser.error(f"--export {options.export}: no such folder; `make demo` writes one")
    for name, measure in (
        ("train, first step", until_first_step),
        ("serve, first answer", lambda: until_first_answer(options.export, options.port)),
    ):
        wall, cpu = min(measure() for _ in range(options.rounds))
        print(f"{name}: {wall:.1f} s, {cpu:.1f} s of processor time", flush=True)
    over = False
    for command, allowed in BUDGET.items():
        seconds, found = imports_of(command)
        more = found - allowed
        over |= bool(more)
        print(
            f"{command} --help: {seconds:.2f} s, imports {', '.join(sorted(found)) or 'none'}"
            + (f"; NOT IN ITS BUDGET: {', '.join(sorted(more))}" if more else ""),
            flush=True,
        )
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
