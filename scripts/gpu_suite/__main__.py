"""Command line of the suite."""

import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from configs.command_line import CommandParser
from scripts.gpu_suite import elementwise, gemm, grouped, layers, moe, quantize, serve, training
from scripts.gpu_suite.harness import Place

SECTIONS = {
    section.NAME: section
    for section in (quantize, gemm, grouped, layers, elementwise, moe, training, serve)
}


def main() -> None:
    """Run the chosen sections; exit 1 if a kernel is wrong or there is no device."""
    parser = CommandParser(
        prog="python -m scripts.gpu_suite",
        description="Every kernel on a CUDA device: correctness first, then time.",
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=20, help="timed runs of each (default 20)")
    parser.add_argument("--check-only", action="store_true", help="correctness, no times")
    parser.add_argument("--json", type=Path, help="where to write all results")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on the CPU: does the suite itself work?"
    )
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing measured (--dry-run tries the suite itself on a CPU)")
    device = torch.device("cpu" if options.dry_run else "cuda:0")
    place = Place(device, options.dry_run, options.rounds)
    report = _environment(place)
    print(", ".join(f"{key} {value}" for key, value in report.items()), flush=True)
    failed = 0
    for name in options.sections:
        failed += _section(name, place, options.check_only, report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    if failed:
        sys.exit(f"{failed} checks failed")


def _section(name: str, place: Place, check_only: bool, report: dict[str, Any]) -> int:
    """Run the checks, then the timings if all passed; returns the number of failures."""
    section = SECTIONS[name]
    start = time.perf_counter()
    checks = list(section.check(place))
    failed = [check for check in checks if not check.passed]
    worst = max(checks, key=lambda check: check.figure / check.limit if check.limit else 0)
    print(f"\n## {name}: {len(checks) - len(failed)} of {len(checks)} checks passed, ", end="")
    print(f"nearest to its limit: {worst.case} {worst.figure:.2g} of {worst.limit:.2g}")
    for check in failed:
        print(f"FAILED {check.case}: {check.figure:.3g}, limit {check.limit:.3g}")
    timings = []
    if not failed and not check_only:
        print("\n| case | implementation | ms | rate | ours is faster by |\n|---|---|---|---|---|")
        for timing in section.measure(place):
            timings.append(timing)
            print("\n".join(timing.lines()), flush=True)
    report[name] = {
        "seconds": time.perf_counter() - start,
        "checks": [asdict(check) for check in checks],
        "timings": [asdict(timing) for timing in timings],
    }
    return len(failed)


def _environment(place: Place) -> dict[str, Any]:
    cuda = place.device.type == "cuda"
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent, capture_output=True, text=True,
    )  # fmt: skip
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(place.device) if cuda else "CPU, dry run",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "commit": git.stdout.strip() or "unknown",
    }


if __name__ == "__main__":
    main()
