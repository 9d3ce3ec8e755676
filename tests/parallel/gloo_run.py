"""`gloo_run.py N`: N functional all-gathers, as DTensor starts them, 16 at a time."""

import sys

import torch
import torch.distributed as dist

from parallel.ranks import start_ranks, stop_ranks

IN_FLIGHT = 16


def main(gathers: int) -> None:
    ranks = start_ranks(threads=1)
    collectives, group = torch.ops._c10d_functional, dist.group.WORLD
    assert group is not None
    x, right = torch.tensor([float(ranks.rank)]), torch.arange(float(ranks.world))
    for _ in range(-(-gathers // IN_FLIGHT)):
        running = [
            collectives.all_gather_into_tensor(x, ranks.world, group.group_name)
            for _ in range(IN_FLIGHT)
        ]
        assert all(torch.equal(collectives.wait_tensor(out), right) for out in running)
    stop_ranks()


if __name__ == "__main__":
    main(int(sys.argv[1]))
