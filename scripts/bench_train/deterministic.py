"""`python -m scripts.bench_train.deterministic FILE.toml [--steps N] [--section.key=value ...]`:
what `train.deterministic` costs, and whether runs have the same bits with and without it.

Trains the experiment in short runs, in turn with and without it, in one process each; under
torchrun on all ranks. Prints the median time of a step for both, their ratio, and the number of
different results.
"""

import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from configs.command_line import CommandParser
from configs.errors import UserError
from configs.loader import load

_ROUNDS = 3


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = CommandParser(
        prog="python -m scripts.bench_train.deterministic", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("file", help="experiment (TOML)")
    parser.add_argument("--steps", type=int, default=10, help="steps of each run (default 10)")
    parser.add_argument("--nproc", type=int, default=1, help="ranks (default 1)")
    options, overrides = parser.parse_known_args(arguments)
    try:
        load(options.file, overrides)
        if options.steps < 3 or options.nproc < 1:
            raise UserError("--steps: at least 3; --nproc: at least 1")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    times: dict[bool, list[float]] = {True: [], False: []}
    bits: dict[bool, set[str]] = {True: set(), False: set()}
    for _ in range(_ROUNDS):
        for deterministic in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                words = [
                    *overrides, f"--train.steps={options.steps}", f"--run.dir={folder}/run",
                    f"--train.deterministic={str(deterministic).lower()}",
                ]  # fmt: skip
                command = ["launch.local", options.file, f"--nproc={options.nproc}", *words]
                done = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.DEVNULL)
                if done.returncode:
                    return done.returncode
                run = Path(folder) / "run"
                lines = (run / "metrics.jsonl").read_text().splitlines()
                # the first steps start threads and compile kernels
                times[deterministic] += [json.loads(line)["step_s"] for line in lines[2:]]
                bits[deterministic].add(_digest(run))
    medians = {key: statistics.median(values) for key, values in times.items()}
    for key, name in ((True, "deterministic"), (False, "default")):
        print(
            f"{name:<14} {1e3 * medians[key]:8.1f} ms per step, {len(bits[key])} different "
            f"results in {_ROUNDS} runs"
        )
    print(f"ratio {medians[True] / medians[False]:.3f}, {len(times[True])} steps each, in turn")
    return 0


def _digest(run: Path) -> str:
    """Of the weights and optimizer state of the newest checkpoint."""
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    whole = hashlib.sha256()
    for path in sorted(newest.glob("*.safetensors")):
        whole.update(path.read_bytes())
    return whole.hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
