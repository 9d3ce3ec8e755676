"""The checks of the FP8 products, on the Gluon kernel: a wrong barrier waits forever.

`python -m scripts.gpu_suite.gluon` runs them alone, for tools that observe a whole process.
"""

import sys
from collections.abc import Iterator

import torch

from configs.command_line import CommandParser
from scripts.gpu_suite import gemm
from scripts.gpu_suite.harness import Check, Place
from scripts.gpu_suite.runner.section import Unsupported


def check(place: Place) -> Iterator[Check]:
    """Those of `gemm`; in a dry run of the plain kernel's reference."""
    if not place.dry_run and torch.cuda.get_device_capability(place.device)[0] != 9:
        raise Unsupported("the Gluon kernel needs a Hopper GPU")
    yield from gemm.check(place, "triton" if place.dry_run else "gluon")


def main() -> None:
    """The last line is the result; exit 1 if a check failed."""
    parser = CommandParser(prog="python -m scripts.gpu_suite.gluon", description=__doc__)
    parser.add_argument("--smallest", action="store_true", help="one shape only")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU")
    options = parser.parse_args()
    place = Place(torch.device("cpu" if options.dry_run else "cuda:0"), options.dry_run)
    shapes = [gemm.CHECKED[0]] if options.smallest else None
    implementation = "triton" if options.dry_run else "gluon"
    checks = list(gemm.check(place, implementation, shapes))  # type: ignore[arg-type]
    failed = [check for check in checks if not check.passed]
    print(f"{len(failed)} of {len(checks)} checks failed", end="")
    print(f", first: {failed[0].case}: {failed[0].figure:.3g}" if failed else "")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
