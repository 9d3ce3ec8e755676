"""`python -m scripts.inject_faults RUN --kill-rank R`: inject a fault into a running training.

    python -m launch.local FILE.toml --nproc 4 --module scripts.inject_faults.rank &
    python -m scripts.inject_faults RUN --freeze 2
    python -m scripts.inject_faults RUN --nan 1

RUN is the run's folder. Killing, freezing and flipping a bit of a checkpoint need nothing of the
run; they act on processes and files of this host. The other faults need ranks that run the module
`scripts.inject_faults.rank` in place of `train` (also under torchrun: `-m
scripts.inject_faults.rank FILE.toml ...`). Try it on a copy of your experiment, with its own
`run.dir`: --flip-bit damages a file.
"""

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from configs.command_line import CommandParser
from configs.errors import UserError
from configs.paths import local_path
from scripts.inject_faults.requests import READY, Request, folder_of, send

PROCESSES = "processes.json"


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = CommandParser(
        prog="python -m scripts.inject_faults", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("run", help="folder of the run")
    rank: dict[str, Any] = {"type": int, "metavar": "RANK"}
    parser.add_argument("--kill-rank", **rank, help="kill -9 a rank")
    parser.add_argument("--freeze", **rank, help="stop a rank (SIGSTOP)")
    parser.add_argument("--thaw", **rank, help="continue a stopped rank (SIGCONT)")
    parser.add_argument("--terminate", **rank, help="send SIGTERM to a rank")
    parser.add_argument(
        "--flip-bit", action="store_true", help="flip one bit of the newest checkpoint"
    )
    parser.add_argument("--nan", **rank, help="make the loss of one microbatch of a rank NaN")
    parser.add_argument("--nan-gradient", **rank, help="the same for a gradient")
    parser.add_argument("--skip-collective", **rank, help="leave out one all-reduce on a rank")
    parser.add_argument("--flip-weight", **rank, help="flip one bit of a weight of a rank")
    parser.add_argument("--spike", **rank, help="multiply a rank's part of the embedding by 1000")
    parser.add_argument("--slow", **rank, help="make a rank slower, by --percent")
    parser.add_argument(
        "--percent", type=float, default=20.0, help="of --slow (default 20; 0 ends)"
    )
    parser.add_argument("--disk-full", **rank, help="let a rank's checkpoints fail, for --steps")
    parser.add_argument("--steps", type=int, default=10, help="of --disk-full (default 10)")
    parser.add_argument("--seed", type=int, help="of --flip-bit, to repeat it")
    options = vars(parser.parse_args(arguments))
    try:
        lines = _inject(local_path(options["run"]), options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not lines:
        print("error: no fault given; see --help", file=sys.stderr)
        return 2
    print(*lines, sep="\n")
    return 0


def _inject(run: Path, options: dict[str, Any]) -> list[str]:
    """Inject the chosen faults; returns what was done. Raises UserError."""
    if not run.is_dir():
        raise UserError(f"{run}: no such folder of a run")
    for option, low, high in (("percent", 0, 1e4), ("steps", 1, 10**6)):
        if not low <= options[option] <= high:
            raise UserError(f"--{option} {options[option]}: must be from {low:g} to {high:g}")
    lines = []
    for option, number in (
        ("kill_rank", signal.SIGKILL), ("freeze", signal.SIGSTOP), ("thaw", signal.SIGCONT),
        ("terminate", signal.SIGTERM),
    ):  # fmt: skip
        if options[option] is not None:
            lines.append(_signal(run, options[option], number))
    if options["flip_bit"]:
        lines.append(flip_bit(run, random.Random(options["seed"])))
    for option, request in (
        ("nan", Request("nan")), ("nan_gradient", Request("nan_gradient")),
        ("skip_collective", Request("skip")), ("flip_weight", Request("flip_weight")),
        ("spike", Request("spike")), ("slow", Request("slow", options["percent"])),
        ("disk_full", Request("disk_full", float(options["steps"]))),
    ):  # fmt: skip
        if options[option] is not None:
            _check_process(options[option], *_check_rank(run, options[option]))
            if not (folder_of(run) / READY).is_file():
                raise UserError(
                    f"{run}: its ranks do not accept faults; start them with the module "
                    "scripts.inject_faults.rank in place of train"
                )
            send(run, options[option], request)
            lines.append(f"rank {options[option]}: {request.kind} at its next step")
    return lines


def processes(run: Path) -> dict[int, tuple[str, int]]:
    """Host and process id of every rank of the running attempt. Raises UserError."""
    path = run / PROCESSES
    try:
        table = json.loads(path.read_bytes())
        return {int(rank): (str(at["host"]), int(at["pid"])) for rank, at in table.items()}
    except OSError:
        raise UserError(f"{path}: not found; the run has not started its first step") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: damaged; start the run again") from None


def _check_rank(run: Path, rank: int) -> tuple[str, int]:
    table = processes(run)
    if rank not in table:
        raise UserError(f"rank {rank}: the run has the ranks 0 to {max(table)}")
    return table[rank]


def _check_process(rank: int, host: str, pid: int) -> None:
    """Raise UserError if the process of a rank of this host has ended."""
    if host == socket.gethostname() and not _command(pid) and Path("/proc/self").exists():
        raise UserError(f"rank {rank}: process {pid} has ended")


def _command(pid: int) -> bytes:
    """The command line of a process; empty if it has ended, or the system does not show it."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _signal(run: Path, rank: int, number: signal.Signals) -> str:
    host, pid = _check_rank(run, rank)
    if host != socket.gethostname():
        raise UserError(f"rank {rank}: runs on {host}; run this command there")
    _check_process(rank, host, pid)
    command = _command(pid)
    if command and b"train" not in command and b"inject_faults" not in command:
        raise UserError(f"rank {rank}: process {pid} is no longer a rank; has the run ended?")
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        raise UserError(f"rank {rank}: process {pid} has ended") from None
    return f"rank {rank} (process {pid}): {number.name} at {time.strftime('%T')}"


def flip_bit(run: Path, source: random.Random) -> str:
    """Flip one random bit of a random file of the newest checkpoint; returns what was done."""
    found = sorted((run / "checkpoints").glob("step-*"))
    files = sorted(p for p in found[-1].rglob("*") if p.is_file()) if found else []
    if not files:
        raise UserError(f"{run / 'checkpoints'}: no checkpoint yet")
    path = source.choices(files, [file.stat().st_size for file in files])[0]
    place, bit = source.randrange(path.stat().st_size), source.randrange(8)
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))
    return f"{path}: bit {bit} of byte {place} flipped"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
