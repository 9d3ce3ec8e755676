"""`python -m scripts.fp8_convergence OUT`: the loss of FP8 training compared with that of bf16.

Trains pairs of runs, the same model, seed and data in bf16 and in `fp8_blockwise`, and the demo
model with the arithmetic of `train.fp8_emulation` too, each by the trainer in a separate process
with one thread. Writes OUT/results.json, OUT/results.md, and the pictures fp8-curves.png and
fp8-ablations.png. Complete runs in OUT are not repeated; others continue from their last
checkpoint.

The precision of such a comparison is limited by the reproducibility of bf16. So every pair has a
control, `bf16_again`: the same training with microbatches of half the size, which only changes the
order of sums. `STEADY` has the settings that make controls agree; with the demo's own, made for 400
steps, a control of 1,500 ended 6 percent below its pair.

On a CPU scales are powers of two: its bf16 products then represent FP8 operands exactly, which is
faster than fp32. `--variants fp8_blockwise_fp32_scales` trains with arbitrary scales.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.command_line import CommandParser
from configs.loader import load
from models.decoder import Decoder
from models.fp8 import apply_fp8, gemm_shares
from scripts.fp8_convergence.pictures import draw
from train.fp8_emulation import VARIANTS as ARITHMETIC
from train.report.metrics import METRICS, read_lines

MODELS = {
    "demo": "configs/demo.toml",
    "deepseek_v3": "configs/tiny/deepseek_v3.toml",
    "qwen3": "configs/tiny/qwen3.toml",
}
BF16, FP8, FP32_SCALES = "bf16", "fp8_blockwise", "fp8_blockwise_fp32_scales"
CONTROL = "bf16_again"
PAIR = (BF16, CONTROL, FP8)
ABLATIONS = tuple(name for name in ARITHMETIC if name != "blockwise")
VARIANTS = (*PAIR, FP32_SCALES, *ARITHMETIC)
STEADY = {
    "demo": ("--optimizer.lr=2e-4", "--model.moe.bias_update_rate=0.002"),
    "deepseek_v3": ("--optimizer.lr=5e-4",),
    "qwen3": ("--optimizer.lr=5e-4",),
}
"""Changes of the experiments in MODELS for a comparison. At learning rates for short trainings any
rounding affects when a model learns something; balancing biases that move in large steps also
change the experts of tokens after a rounding."""


WARMUP = {"demo": 30, "deepseek_v3": 10, "qwen3": 10}
"""Steps, for any length of the run."""


@dataclass(frozen=True)
class Run:
    """One training."""

    model: str
    variant: str
    seed: int
    steps: int
    out: Path

    @property
    def folder(self) -> Path:
        return self.out / f"{self.model}-{self.variant}-seed{self.seed}-{self.steps}"

    def command(self, overrides: list[str]) -> list[str]:
        """The command line of the run."""
        words = [
            f"--run.dir={self.folder}", f"--run.seed={self.seed}", f"--train.steps={self.steps}",
            "--train.threads=1", f"--validation.every={max(self.steps // 10, 1)}",
            f"--schedule.warmup_steps={min(WARMUP[self.model], self.steps)}",
            "--checkpoint.every=250", "--checkpoint.keep=1", *STEADY[self.model], *overrides,
        ]  # fmt: skip
        if self.variant in (BF16, CONTROL):
            words.append("--precision.recipe=bf16")
            if self.variant == CONTROL:
                micro_batch = load(MODELS[self.model], overrides).train.micro_batch
                words.append(f"--train.micro_batch={micro_batch // 2}")
        else:
            words.append("--precision.recipe=fp8_blockwise")
            if self.variant != FP32_SCALES:
                words.append("--precision.fp8.power_of_two=true")
        program = ["train"]
        if self.variant in ARITHMETIC:
            program = ["scripts.fp8_convergence.ablations", self.variant]
        return [sys.executable, "-m", *program, MODELS[self.model], *words]

    def records(self) -> list[dict[str, Any]]:
        """The records written so far."""
        return read_lines(self.folder / METRICS)

    def final(self) -> float | None:
        """Validation loss after the last step, None if the run is not complete."""
        last = self.records()[-1:]
        if not last or last[0]["step"] != self.steps:
            return None
        loss: float | None = last[0].get("validation_loss")
        return loss


def main() -> None:
    """Train the missing runs, then write table and pictures."""
    options = _options()
    runs = [
        Run(model, variant, seed, options.steps, options.out)
        for model in options.models
        for variant in options.variants
        for seed in _seeds(model, variant, options)
    ]
    train_all(runs, options.jobs, options.overrides)
    results = collect(runs, options.overrides)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "results.md").write_text(table(results))
    print(table(results))
    curves = {
        model: {
            variant: {
                run.seed: run.records()
                for run in runs
                if (run.model, run.variant) == (model, variant)
            }
            for variant in options.variants
        }
        for model in options.models
    }
    for picture in draw(curves, options.images or options.out):
        print(f"drew {picture}")


def _options() -> argparse.Namespace:
    parser = CommandParser(prog="python -m scripts.fp8_convergence", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the runs, the table and the pictures")
    parser.add_argument("--steps", type=int, default=1500, help="steps per run (default 1500)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2],
        help="of the demo model; the others train with the first (default 0 1 2)",
    )  # fmt: skip
    parser.add_argument(
        "--ablation-seeds", type=int, nargs="+",
        help="of the ablations, which train the demo model only (default: the first seed)",
    )  # fmt: skip
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=[*PAIR, *ABLATIONS],
        help="default: bf16, its control, FP8 and the ablations",
    )  # fmt: skip
    parser.epilog = "Anything else overrides the experiments: --section.key=value."
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument("--images", type=Path, help="folder of the pictures (default OUT)")
    options, overrides = parser.parse_known_args()
    options.overrides = overrides
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def _seeds(model: str, variant: str, options: argparse.Namespace) -> list[int]:
    found: list[int] = options.seeds if model == "demo" else options.seeds[:1]
    if variant not in ARITHMETIC:
        return found
    wanted = options.ablation_seeds or found[:1]
    return [seed for seed in wanted if seed in found] if model == "demo" else []  # need their bf16


def train_all(runs: list[Run], jobs: int, overrides: list[str]) -> None:
    """Run those that are not complete, `jobs` at a time; prints progress and the estimated end."""
    waiting = [run for run in runs if run.final() is None]
    done_before = sum(len(run.records()) for run in waiting)
    total, start, told = sum(run.steps for run in waiting), time.monotonic(), 0.0
    print(f"{len(runs) - len(waiting)} runs are complete, {len(waiting)} to train", flush=True)
    todo, active = list(waiting), dict[Run, subprocess.Popen[bytes]]()
    try:
        while todo or active:
            while todo and len(active) < jobs:
                run = todo.pop(0)
                active[run] = _start(run, overrides)
            time.sleep(0.2)
            for run in [run for run, process in active.items() if process.poll() is not None]:
                code = active.pop(run).returncode
                loss = run.final()
                if code or loss is None:
                    log = run.folder.with_suffix(".log")
                    raise SystemExit(f"{run.folder.name} ended with code {code}; see {log}")
                print(f"{run.folder.name}: validation loss {loss:.4f}", flush=True)
            if time.monotonic() - told > 60 or not (todo or active):
                told = time.monotonic()
                made = sum(len(run.records()) for run in waiting) - done_before
                if made:
                    left = (total - done_before - made) * (told - start) / made
                    print(
                        f"{done_before + made:,} of {total:,} steps, about {left / 60:.0f} minutes "
                        "left",
                        flush=True,
                    )
    finally:
        for process in active.values():
            process.terminate()


def _start(run: Run, overrides: list[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with run.folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            run.command(overrides), stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def collect(runs: Iterable[Run], overrides: list[str]) -> dict[str, Any]:
    """Final validation losses by model, variant and seed, with differences from bf16."""
    found: dict[str, Any] = {}
    for run in runs:
        loss = run.final()
        model = found.setdefault(
            run.model, {"steps": run.steps, **shares(run.model, overrides), "losses": {}}
        )
        model["losses"].setdefault(run.variant, {})[str(run.seed)] = loss
    for model in found.values():
        base = model["losses"].get(BF16, {})
        model["difference_percent"] = {
            variant: {s: 100 * (loss / base[s] - 1) for s, loss in by_seed.items() if s in base}
            for variant, by_seed in model["losses"].items()
            if variant != BF16
        }
    return found


def shares(model: str, overrides: list[str]) -> dict[str, float]:
    """Share of the FLOPs of matrix products in FP8."""
    config = load(MODELS[model], overrides)
    with torch.device("meta"):
        decoder = Decoder(config.model)
    apply_fp8(decoder, config.precision.fp8)
    found = gemm_shares(decoder, config.data.seq_len)
    return {
        "fp8_of_eligible": found.fp8 / found.eligible,
        "fp8_of_all_products": found.fp8 / found.every,
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| model | arithmetic | seed: validation loss (difference from bf16) | mean difference | "
        "GEMM FLOPs in FP8: of eligible, of all |",
        "|---|---|---|---|---|",
    ]
    for model, found in results.items():
        share = f"{found['fp8_of_eligible']:.0%}, {found['fp8_of_all_products']:.0%}"
        for variant, losses in found["losses"].items():
            differences = found["difference_percent"].get(variant, {})
            cells = [
                f"{seed}: {loss:.4f}" + (f" ({differences[seed]:+.2f} %)" if differences else "")
                for seed, loss in losses.items()
            ]
            mean = sum(differences.values()) / len(differences) if differences else None
            lines.append(
                f"| {model}, {found['steps']:,} steps | {variant} | {'; '.join(cells)} | "
                f"{'' if mean is None else f'{mean:+.2f} %'} | "
                f"{'' if variant in (BF16, CONTROL) else share} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
