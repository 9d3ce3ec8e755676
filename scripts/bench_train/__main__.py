"""`python -m scripts.bench_train`: the trainer against other trainers, interleaved on this machine.

Each peer trains the same model as the trainer on batches of the same size from the same corpus, on
the same two cores: `plain` is a straightforward loop and `transformers` a loop over its Qwen3-MoE,
each one process of two threads; `torchtitan` is its own Trainer on its DeepSeek-V3 debug model on
two ranks (`-selective`: both sides recompute selectively; `-fsdp`: FSDP2 without expert
parallelism). The trainer runs two ranks of one thread; with `--ranks 1` one process of two threads
against peers of one process. Both sides multiply in the trainer's dtype: bf16 where the CPU has
instructions for it, otherwise fp32. The runs alternate, so that other load on the machine affects
both; the result is the median of the rounds' ratios. CPU only.
"""

import os
import statistics
import subprocess
import time

import torch

from configs.command_line import CommandParser
from configs.loader import load
from scripts.bench_train.peers import PEERS, WARMUP, Peer, Result, run_peer, run_trainer
from train.compute_dtype import compute_dtype
from train.data.corpus import prepare
from train.report.metrics import FORCED_BALANCE


def main() -> None:
    """Alternate the trainer and each peer, print every run and the ratios."""
    parser = CommandParser(prog="python -m scripts.bench_train", description=__doc__)
    names = ",".join(PEERS)
    parser.add_argument("--peers", default="plain", help=f"some of {names} (default plain)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default 5)")
    parser.add_argument("--steps", type=int, default=40, help="steps per run (default 40)")
    parser.add_argument(
        "--ranks", type=int, choices=(1, 2), default=2, help="of the trainer (default 2)"
    )
    options = parser.parse_args()
    peers = options.peers.split(",")
    for name in peers:
        if name not in PEERS:
            parser.error(f"--peers {name}: must be some of {names}")
    if options.steps <= WARMUP or options.rounds < 1:
        parser.error(f"--steps must be more than the {WARMUP} of warm-up, --rounds at least 1")
    print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores {_cpu()}, torch {torch.__version__}"
    )
    for name in peers:
        _compare(PEERS[name], options.rounds, options.steps, options.ranks)


def _compare(peer: Peer, rounds: int, steps: int, ranks: int) -> None:
    """ranks: of the trainer, if the peer is one process."""
    threads = 2 // ranks if peer.threads > 1 else 1
    config = load(peer.experiment, peer.arguments)
    if config.model.moe.force_balance:
        print(FORCED_BALANCE)
    corpus = prepare(config, lambda line: None)
    dtype = str(compute_dtype(config, torch.device("cpu"))).removeprefix("torch.")
    ours: list[Result] = []
    theirs: list[Result] = []
    for round_ in range(1, rounds + 1):
        try:
            theirs.append(run_peer(peer, steps, corpus.folder / "train.npy", dtype))
            batch = f"--train.micro_batch={4 * threads}"  # of 8 sequences on two cores
            ours.append(
                run_trainer(peer.experiment, [*peer.arguments, batch], steps, 2 // threads, threads)
            )
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{peer.name}, round {round_}: {error}\n{error.stderr}") from None
        speed = theirs[-1].tokens_per_s, ours[-1].tokens_per_s
        print(
            f"{peer.name} {round_} of {rounds}: peer {speed[0]:,.0f} tokens/s, trainer "
            f"{speed[1]:,.0f}, ratio {speed[1] / speed[0]:.2f}",
            flush=True,
        )
    speeds = [statistics.median(r.tokens_per_s for r in each) for each in (theirs, ours)]
    memory = [statistics.median(r.memory_gib for r in each) for each in (theirs, ours)]
    losses = [f"{each[0].losses[0]:.2f} to {each[0].losses[1]:.2f}" for each in (theirs, ours)]
    ratios = sorted(b.tokens_per_s / a.tokens_per_s for a, b in zip(theirs, ours, strict=True))
    print(
        f"{peer.name}, {dtype}, medians of {rounds}: {speeds[0]:,.0f} and {speeds[1]:,.0f} "
        f"tokens/s; ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); "
        f"memory {memory[0]:.2f} and {memory[1]:.2f} GiB per process, ratio "
        f"{memory[1] / memory[0]:.2f}; loss {losses[0]} and {losses[1]}"
    )


def _cpu() -> str:
    name = torch.cpu.get_capabilities()
    return f"{name['cpu_name']}, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
