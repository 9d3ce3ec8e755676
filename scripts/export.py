"""`python -m scripts.export RUN`: converts a checkpoint to a Hugging Face folder.

    python -m scripts.export runs/demo                    # newest checkpoint -> runs/demo/export
    python -m scripts.export runs/demo --dtype bf16       # half the size, rounded weights
    python -m scripts.export runs/demo --dtype fp8        # a quarter: DeepSeek-V3's blocks
    python -m scripts.export runs/demo/checkpoints/step-00000100 --out ~/model

The contents of the folder are described in `train.convert.hf_export`.
"""

import sys
from pathlib import Path

import torch

from configs.command_line import CommandParser
from configs.errors import UserError
from models.hf.files import read_config
from models.hf.fp8_blocks import Fp8Plan, fp8_plan
from parallel.ranks import one_line
from train.convert.hf_export import export_hf

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def main() -> int:
    """Command line; returns the exit code."""
    parser = CommandParser(prog="python -m scripts.export", description=__doc__)
    parser.add_argument("source", type=Path, help="run folder, or one of its checkpoints")
    parser.add_argument("--out", type=Path, help="folder to write (default: <run>/export)")
    names = ", ".join(_DTYPES)
    parser.add_argument("--dtype", default="fp32", help=f"{names}; default: fp32, exact")
    arguments = parser.parse_args()
    try:
        if arguments.dtype not in _DTYPES:
            raise UserError(f"--dtype {arguments.dtype}: must be one of {names}")
        out = export_hf(arguments.source, arguments.out, _DTYPES[arguments.dtype])
    except (UserError, OSError) as error:
        line = one_line(error) if isinstance(error, OSError) else error
        print(f"error: {line}", file=sys.stderr)
        return 2
    print(f"exported {out}")
    if arguments.dtype == "fp8":
        print(_in_words(fp8_plan(read_config(out)[0])))
    return 0


def _in_words(plan: Fp8Plan) -> str:
    said = f"{plan.share:.1%} of the parameters in FP8"
    if plan.unfit:
        said += (
            f"; {len(plan.unfit)} groups of projections stay bf16, as some reader would refuse or "
            f"misread their blocks (docs/export.md), the first is {plan.unfit[0]}"
        )
    return said


if __name__ == "__main__":
    sys.exit(main())
