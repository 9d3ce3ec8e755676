"""The common options of all commands of `python -m serve`: the export, and the engine's sizes."""

import argparse
from pathlib import Path

from configs.command_line import CommandParser
from serve.engine.core import EngineOptions


def make_parser(command: str, description: str) -> CommandParser:
    """A parser with the common options."""
    sizes = EngineOptions()
    parser = CommandParser(
        prog=f"python -m {command}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="export, such as runs/demo/export")
    parser.add_argument(
        "--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="auto: that of the export"
    )
    parser.add_argument("--device", default="auto", help="auto: cuda where there is one, or cpu")
    for name, value, text in (
        ("--tp", 1, "ranks, started by torchrun, that divide heads, widths and vocabulary"),
        ("--ep", 1, "ranks, started by torchrun, that divide the experts"),
        ("--max-running", sizes.max_running, "requests computed together"),
        ("--max-waiting", sizes.max_waiting, "requests that may wait; more get 429"),
        ("--max-batch-tokens", sizes.max_batch_tokens, "tokens per step; prompts may take several"),
        ("--kv-tokens", sizes.kv_tokens, "size of the KV cache; 0: what max-running needs"),
        ("--page-size", sizes.page_size, "tokens per page of the KV cache"),
    ):
        parser.add_argument(name, type=int, default=value, help=text)
    parser.add_argument(
        "--cache",
        choices=["radix", "naive"],
        default=sizes.cache,
        help="radix: computed prefixes are used again; naive: never",
    )
    parser.add_argument(
        "--overlap",
        choices=["auto", "on", "off"],
        default=sizes.overlap,
        help="choose the next batch while the device computes; auto: on a GPU",
    )
    parser.add_argument(
        "--routed-experts",
        action="store_true",
        help="keep the experts of every token, for requests that ask for them",
    )
    parser.add_argument(
        "--absorb-mla",
        action="store_true",
        help="multi-head latent attention with less work per key, and other last bits; always on "
        "a GPU",
    )
    parser.add_argument(
        "--jump-forward",
        choices=["on", "off"],
        default=sizes.jump_forward,
        help="on: tokens that a grammar forces are appended without a forward pass each",
    )
    parser.add_argument(
        "--cuda-graphs",
        choices=["auto", "off"],
        default=sizes.cuda_graphs,
        help="auto: on a GPU, steps that only decode are CUDA graphs",
    )
    for name, text in (
        ("--kv-events", "publish events of the prefix cache there, such as tcp://127.0.0.1:5557"),
        ("--kv-events-replay", "answer requests for missed events there"),
    ):
        parser.add_argument(name, default="", metavar="ENDPOINT", help=text)
    return parser


def engine_options(options: argparse.Namespace) -> EngineOptions:
    """The options of a parsed command line. Raises UserError if they are invalid."""
    return EngineOptions(**{name: getattr(options, name) for name in vars(EngineOptions())})
