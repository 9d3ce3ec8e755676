"""`torchrun --nproc-per-node N -m scripts.bench_dispatch.reduce_scatter`: FSDP2's reduction of
gradients on CPUs, by gloo's own reduce-scatter and by ours, in alternating rounds.

Prints the median time of each for several sizes (fp32), after comparing the results.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.gloo import AllToAllReduceScatter
from train.report.environment import cpu_name

SIZES = (2**14, 2**17, 2**20, 2**22)
ROUNDS = 30


def main() -> int:
    """Measure on the ranks that torchrun started."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    ours = AllToAllReduceScatter()
    ways: dict[str, Callable[[Tensor, Tensor], object]] = {
        "gloo": lambda out, x: dist.reduce_scatter_tensor(out, x),
        "all-to-all and sum": lambda out, x: ours(out, x, group, dist.ReduceOp.SUM),
    }
    torch.set_num_threads(1)
    first = group.rank() == 0
    if first:
        print(f"{time.strftime('%Y-%m-%d')}, {cpu_name()}, torch {torch.__version__}, "
              f"{group.size()} ranks, one thread each")  # fmt: skip
    for size in SIZES:
        whole = torch.randn(size)
        parts = {name: torch.empty(size // group.size()) for name in ways}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, reduce in ways.items():
                dist.barrier()
                start = time.perf_counter()
                reduce(parts[name], whole)
                seconds[name].append(time.perf_counter() - start)
        torch.testing.assert_close(*parts.values())
        if first:
            found = {name: statistics.median(times) * 1e3 for name, times in seconds.items()}
            cells = "  ".join(f"{name} {ms:.2f} ms" for name, ms in found.items())
            print(f"{size * 4 / 2**20:8.2f} MiB  {cells}", flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
