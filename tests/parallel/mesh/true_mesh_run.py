"""One rank of an experiment at its real size: `true_mesh_run.py RANK FILE.toml [OVERRIDE ...]`."""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from configs.loader import load
from configs.parallel_dims import default_world
from parallel.ranks import Ranks
from parallel.shards import box_of, local_of
from train.build import shard_model


def held(which: int, file: str, *overrides: str) -> dict[str, Any]:
    """Shares of rank `which` (negative: from the end), in elements, and the meshes' shapes."""
    config = load(file, overrides)
    world, store = default_world(config), FakeStore()
    ranks = Ranks(which % world, world, torch.device("cpu"), store)
    dist.init_process_group("fake", store=store, rank=ranks.rank, world_size=world)
    sharded = shard_model(config, ranks, torch.bfloat16)
    mesh, model = sharded.mesh, sharded.model
    elements = 0
    for parameter in model.parameters():
        assert tuple(local_of(parameter).shape) == box_of(parameter).shape
        elements += local_of(parameter).numel()
    views = {"dense": mesh.dense, "whole": mesh.whole, "expert": mesh.expert}
    shapes = {name: list(view.shape) for name, view in views.items()}
    dist.destroy_process_group()
    return {"elements": elements, "meshes": shapes}


if __name__ == "__main__":
    print(json.dumps(held(int(sys.argv[1]), *sys.argv[2:])))
