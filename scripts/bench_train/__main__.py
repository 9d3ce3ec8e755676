"""`python -m scripts.bench_train`: the trainer against a plain loop, interleaved on this machine.

Both have the same model (8.4 M parameters), batch (8 x 256 tokens) and corpus; the trainer runs on
two ranks with one thread each, the loop of `scripts.bench_train.plain_loop` in one process with two
threads. The runs alternate, so that other load on the machine affects both; the reliable result is
the ratio of the medians. CPU only.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from configs.command_line import CommandParser
from configs.loader import load
from train.data.corpus import prepare
from train.report.metrics import FORCED_BALANCE

EXPERIMENT = "configs/demo.toml"
SAME_MODEL = [
    "--model.attention.n_kv_heads=8",
    "--model.attention.qk_norm=none",
    "--model.moe.n_shared_experts=0",
    "--model.moe.score_func=softmax",
    "--checkpoint.keep=1",
    "--checkpoint.every=0",
    "--validation.every=0",
    "--validation.sequences=1",
]
WARMUP = 5
"""Steps of every run that are not counted."""


def main() -> None:
    """Alternate the two, print every run and the ratio."""
    parser = CommandParser(prog="python -m scripts.bench_train", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="runs of each (default 4)")
    parser.add_argument("--steps", type=int, default=40, help="steps per run (default 40)")
    options = parser.parse_args()
    if load(EXPERIMENT, SAME_MODEL).model.moe.force_balance:
        print(FORCED_BALANCE)
    corpus = prepare(load(EXPERIMENT), print)
    trainer: list[float] = []
    plain: list[float] = []
    for round_ in range(options.rounds):
        plain.append(_plain(options.steps, corpus.folder / "train.npy"))
        trainer.append(_trainer(options.steps))
        print(
            f"round {round_ + 1}: plain loop {plain[-1]:,.0f} tokens/s, "
            f"trainer {trainer[-1]:,.0f}, ratio {trainer[-1] / plain[-1]:.2f}",
            flush=True,
        )
    ratio = statistics.median(trainer) / statistics.median(plain)
    print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, torch {torch.__version__}: "
        f"plain loop {statistics.median(plain):,.0f}, trainer {statistics.median(trainer):,.0f} "
        f"tokens/s (medians of {options.rounds}), ratio {ratio:.2f}"
    )


def _plain(steps: int, corpus: Path) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.bench_train.plain_loop", str(steps), str(corpus)],
        env=os.environ | {"OMP_NUM_THREADS": "2"}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return _median_speed(done.stdout)


def _trainer(steps: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "train", EXPERIMENT, *SAME_MODEL]
        command += [f"--run.dir={folder}/run", f"--train.steps={steps}"]
        subprocess.run(
            [sys.executable, *command],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, text=True,
        )  # fmt: skip
        return _median_speed((Path(folder) / "run" / "metrics.jsonl").read_text())


def _median_speed(lines: str) -> float:
    records = [json.loads(line) for line in lines.splitlines()]
    return statistics.median(r["tokens_per_s"] for r in records[WARMUP:])


if __name__ == "__main__":
    main()
