"""`python -m scripts.fp8_convergence.ablations VARIANT FILE.toml [--section.key=value ...]`: trains
with FP8 arithmetic that no setting offers, to justify the recipe.

VARIANT: blockwise, per_tensor, e5m2_gradients or narrow_accumulator (`train.fp8_emulation`).
"""

import sys

from train.fp8_emulation import VARIANTS, emulated


def main(arguments: list[str]) -> int:
    """Train as `python -m train` does; returns its exit code."""
    from train.__main__ import main as train

    if not arguments or arguments[0] not in VARIANTS:
        print(__doc__, file=sys.stderr)
        return 2
    with emulated(VARIANTS[arguments[0]]):
        return train(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
