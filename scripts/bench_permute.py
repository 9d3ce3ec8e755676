"""`python -m scripts.bench_permute`: permutation of rows to experts and back, against a copy.

The bandwidth counts the bytes that must move (each row read once and written once; each token's K
rows read and its sum written); it is printed with that of a plain copy of the same size.
"""

import time
from collections.abc import Callable

import torch

from configs.command_line import CommandParser
from kernels.moe.permute import combine_rows, gather_rows, permutation


def main() -> None:
    """Measure on the GPU if there is one, otherwise on the CPU, and print one line each."""
    parser = CommandParser(prog="python -m scripts.bench_permute", description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="default 8192")
    parser.add_argument("--width", type=int, default=7168, help="default 7168")
    parser.add_argument("--top-k", type=int, default=8, help="default 8")
    parser.add_argument("--experts", type=int, default=256, help="default 256")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    x = torch.randn(options.tokens, options.width, device=device).bfloat16()
    ids = torch.rand(options.tokens, options.experts, device=device).topk(options.top_k, 1).indices
    to = permutation(ids, options.experts)
    rows = gather_rows(x, to)
    one_way = 2 * rows.nbytes
    cases: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (rows.clone, one_way),
        "permutation": (lambda: permutation(ids, options.experts), 0),
        "permute": (lambda: gather_rows(x, to), one_way),
        "unpermute": (lambda: combine_rows(rows, to, options.top_k), rows.nbytes + x.nbytes),
    }
    print(f"{device}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    for name, (function, n_bytes) in cases.items():
        seconds = _seconds(function, device)
        speed = f", {n_bytes / seconds / 1e9:8.1f} GB/s" if n_bytes else ""
        print(f"{name:<12} {seconds * 1e3:9.3f} ms{speed}")


def _seconds(function: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """The minimum of several runs."""
    best = float("inf")
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        function()
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
