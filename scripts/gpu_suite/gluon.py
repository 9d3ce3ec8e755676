"""`python -m scripts.gpu_suite.gluon`: the checks of the FP8 products, on the Gluon kernel.

The section `gemm` runs it in a separate process before it measures that kernel.
"""

import sys

import torch

from scripts.gpu_suite.gemm import check
from scripts.gpu_suite.harness import Place


def main() -> None:
    """The last line is the result; exit 1 if a check failed or could not run."""
    place = Place(torch.device("cuda:0"), dry_run=False)
    try:
        checks = list(check(place, "gluon"))
    except Exception as error:  # any error is the reason to report
        print(f"{type(error).__name__}: {error}".splitlines()[0])
        sys.exit(1)
    failed = [check for check in checks if not check.passed]
    print(f"{len(failed)} of {len(checks)} checks failed", end="")
    print(f", first: {failed[0].case}: {failed[0].figure:.3g}" if failed else "")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
