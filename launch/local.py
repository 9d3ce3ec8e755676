"""`python -m launch.local FILE.toml --nproc N [--section.key=value ...]`: train on this machine.

    python -m launch.local sweep FILE.toml --nproc 1,2 --set optimizer.lr=1e-3,3e-3

Starts `torchrun -m train` (or one process for one rank), passes signals on and returns 75 if they
stopped the training before its last step: then the same command continues. `sweep` trains every
combination of values in run.dir/NAME, one after the other, and prints a table; a run that is
complete is not repeated.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from configs.command_line import CommandParser
from configs.errors import UserError
from configs.loader import load
from configs.parallel_dims import resolve
from configs.paths import local_path
from launch.render import CHECKOUT
from launch.sweep import own_checkpoints, results, variants

_STOPS = (signal.SIGTERM, signal.SIGUSR1)


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    if arguments and arguments[0] == "sweep":
        return sweep(arguments[1:])
    parser = CommandParser(prog="python -m launch.local", description=__doc__, allow_abbrev=False)
    parser.add_argument("file", help="experiment (TOML)")
    parser.add_argument("--nproc", type=int, default=1, help="ranks (default 1)")
    options, overrides = parser.parse_known_args(arguments)
    try:
        resolve(load(options.file, overrides), options.nproc)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return train([options.file, *overrides], options.nproc)


def sweep(arguments: list[str]) -> int:
    """Train all variants of an experiment; returns 0, or the first code that is not."""
    parser = CommandParser(
        prog="python -m launch.local sweep", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("file", help="experiment (TOML)")
    parser.add_argument("--nproc", default="1", help="ranks, or several numbers: 1,2,4")
    parser.add_argument("--set", action="append", default=[], help="section.key=value,value,...")
    options, overrides = parser.parse_known_args(arguments)
    try:
        if not re.fullmatch(r"[1-9]\d{0,2}(,[1-9]\d{0,2})*", options.nproc):
            raise UserError(f"--nproc {options.nproc}: must be N or N,N,...")
        found = variants(options.set, [int(word) for word in options.nproc.split(",")])
        configs = [load(options.file, [*overrides, *one.overrides]) for one in found]
        for config, one in zip(configs, found, strict=True):
            resolve(config, one.nodes)
        base = local_path(configs[0].run.dir).absolute()
        for one in found:
            print(f"--- {one.name}", flush=True)
            words = [*overrides, *one.overrides, f"--run.dir={base / one.name}"]
            words += own_checkpoints(configs[0], one.name)
            if code := train([options.file, *words], one.nodes):
                return code
        print(results(base), end="")
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def train(arguments: Sequence[str], ranks: int) -> int:
    """Run one training to its end; returns 0, 75 or the code of its failure."""
    command = [sys.executable, "-m", "train", *arguments]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        port = ["--master-addr", "127.0.0.1", "--master-port", str(_free_port())]
        command = [sys.executable, *launcher, *port, "-m", "train", *arguments]
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH", "")]))
    stopped: list[int] = []
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}) as process:

        def stop(number: int, frame: FrameType | None) -> None:
            stopped.append(number)
            # torchrun handles SIGTERM and passes it to its ranks
            process.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, stop) for number in _STOPS}
        # the terminal sends Ctrl-C to the ranks as well: wait until they have saved
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return os.EX_TEMPFAIL if stopped and code else code


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
