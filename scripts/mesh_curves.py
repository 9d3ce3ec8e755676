"""`python -m scripts.mesh_curves OUT.png`: the loss curve of a mesh compared with one process.

Trains the demo model in fp32 three times from the same start: in one process, in one process with
half the microbatch (the same sums in another order: this is fp32 noise), and on four ranks with
dp_shard 2, tp 2, ep 4. Draws the curves and both differences, and prints the largest of each.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from configs.command_line import CommandParser
from train.report.metrics import METRICS, read_lines

EXPERIMENT = "configs/demo.toml"
ONE, NOISE, MESH = "one process", "one process, sums in another order", "dp_shard 2, tp 2, ep 4"
RUNS: dict[str, tuple[int, list[str]]] = {
    ONE: (1, ["--train.micro_batch=4"]),
    NOISE: (1, ["--train.micro_batch=2"]),
    MESH: (4, ["--train.micro_batch=4", "--parallel.tp=2", "--parallel.ep=4"]),
}


def main() -> None:
    """Train, draw, print."""
    parser = CommandParser(prog="python -m scripts.mesh_curves", description=__doc__)
    parser.add_argument("picture", type=Path, help="file of the picture")
    parser.add_argument("--steps", type=int, default=300, help="steps per run (default 300)")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens per sequence")
    options = parser.parse_args()
    common = [
        f"--train.steps={options.steps}", f"--schedule.warmup_steps={min(30, options.steps)}",
        f"--data.seq_len={options.seq_len}",
        "--precision.recipe=fp32", "--checkpoint.every=0", "--validation.every=0",
        "--validation.sequences=1",
    ]  # fmt: skip
    curves = {}
    for name, (ranks, overrides) in RUNS.items():
        curves[name] = _losses(ranks, [*common, *overrides])
        print(f"{name}: {ranks} ranks, last loss {curves[name][-1]:.4f}", flush=True)
    for name in (NOISE, MESH):
        far = max(abs(a - b) for a, b in zip(curves[name], curves[ONE], strict=True))
        first = abs(curves[name][0] - curves[ONE][0])
        print(f"{name}: differs by {first:.1e} at the first step, by {far:.1e} at most")
    _draw(options.picture, curves)


def _losses(ranks: int, overrides: list[str]) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *(launcher if ranks > 1 else []), "-m", "train", EXPERIMENT]
        subprocess.run(
            [*command, f"--run.dir={folder}", *overrides],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        return [float(record["loss"]) for record in read_lines(Path(folder) / METRICS)]


def _draw(picture: Path, curves: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=[2, 1], layout="constrained"
    )
    steps = range(1, len(curves[ONE]) + 1)
    for name, width, style in ((ONE, 3.0, "-"), (MESH, 1.0, "--")):
        top.plot(steps, curves[name], style, lw=width, label=name)
    top.set_ylabel("loss (nats per token)")
    top.legend()
    for name, colour in ((NOISE, "tab:gray"), (MESH, "tab:orange")):
        gaps = [abs(a - b) for a, b in zip(curves[name], curves[ONE], strict=True)]
        bottom.semilogy(steps, gaps, lw=0.8, color=colour, label=name)
    bottom.set_ylabel("difference from one process")
    bottom.set_xlabel("optimizer step")
    bottom.legend()
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
