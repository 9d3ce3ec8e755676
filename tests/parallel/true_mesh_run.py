"""One rank of an experiment at its real size: `true_mesh_run.py RANK FILE.toml [OVERRIDE ...]`."""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from configs.loader import load
from configs.parallel_dims import default_world, resolve
from models.decoder import Decoder
from parallel import mesh as meshes
from parallel.apply import parallelize
from parallel.shards import box_of, local_of


def held(which: int, file: str, *overrides: str) -> dict[str, Any]:
    """What rank `which` (negative: from the end) holds, in elements, and the meshes' shapes."""
    config = load(file, overrides)
    parallel_dims = resolve(config, default_world(config))
    rank = which % parallel_dims.world
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel_dims.world)
    mesh = meshes.build(parallel_dims, "cpu")
    with torch.device("meta"):
        model = Decoder(config.model)
    parallelize(model, mesh, config, torch.bfloat16)
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
