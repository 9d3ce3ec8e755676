"""`python -m scripts.bench_train.attention`: training's attention core on this machine, forward and
backward, for packed documents of 700 tokens.

Compares three ways in alternating rounds, best of each:

- pieces: `models.documents.DocumentAttention`, as training uses it,
- dense: torch's attention with a mask of `[B, L, L]`,
- alone: torch's causal attention, called once per document without any mask or packing.

Memory is what a call needs at its peak, in addition to its operands. Linux only.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from configs.command_line import CommandParser
from kernels.layers.attention import document_attention_reference
from models.attention import Layer
from models.documents import DocumentAttention
from train.report.environment import cpu_name

DOCUMENT = 700
HEADS, GROUPS, WIDTH = 8, 2, 64


def main() -> int:
    """Print a table of milliseconds and MiB."""
    parser = CommandParser(prog="python -m scripts.bench_train.attention", description=__doc__)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 8192])
    parser.add_argument(
        "--window", type=int, default=0, help="tokens that a token attends to; 0: all"
    )
    parser.add_argument("--sinks", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{time.strftime('%Y-%m-%d')}, {cpu_name()}, {options.threads} threads, torch "
        f"{torch.__version__}, bf16, {HEADS} heads of {WIDTH}, {GROUPS} groups, documents of "
        f"{DOCUMENT}, window {options.window}, sinks {options.sinks}"
    )
    for length in options.lengths:
        best: dict[str, tuple[float, int]] = {}
        for _ in range(options.rounds):
            for name, step in ways(length, options).items():
                seconds, memory = timed(step)
                before = best.get(name, (seconds, memory))
                best[name] = min(before[0], seconds), max(before[1], memory)
        cells = (f"{name} {s * 1e3:,.0f} ms, {memory} MiB" for name, (s, memory) in best.items())
        print(f"{length:>6} tokens: {'; '.join(cells)}", flush=True)
    return 0


def ways(length: int, options: Namespace) -> dict[str, Callable[[], None]]:
    """Each runs forward and backward once."""
    torch.manual_seed(0)
    positions_1L = torch.arange(length)[None] % DOCUMENT
    shapes = [(length, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    q, k, v = (torch.randn(s).bfloat16().requires_grad_() for s in shapes)
    sinks = torch.randn(HEADS, requires_grad=True) if options.sinks else None
    grad, layer = torch.randn(length, HEADS, WIDTH).bfloat16(), Layer(0, 0.125, options.window)

    def pieces() -> None:
        DocumentAttention(positions_1L)(layer, q, k, v, sinks).backward(grad)

    def dense() -> None:
        core = DocumentAttention(positions_1L)
        attend(slice(0, length), core.mask(layer))

    def alone() -> None:
        for start in range(0, length, DOCUMENT):
            attend(slice(start, min(start + DOCUMENT, length)), None)

    def attend(rows: slice, mask_1LL: Tensor | None) -> None:
        heads = [x[rows].transpose(0, 1)[None] for x in (q, k, v)]
        out = document_attention_reference(
            heads[0], heads[1], heads[2], mask_1LL, layer.scale, sinks
        )
        out[0].transpose(0, 1).backward(grad[rows])

    found = {"pieces": pieces, "dense": dense}
    return found if options.window else found | {"alone": alone}


def timed(step: Callable[[], None]) -> tuple[float, int]:
    """Seconds, and MiB by which the peak of this process's memory exceeded what it held."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    held, start = _status("VmRSS"), time.perf_counter()
    step()
    return time.perf_counter() - start, (_status("VmHWM") - held) // 1024


def _status(name: str) -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    sys.exit(main())
