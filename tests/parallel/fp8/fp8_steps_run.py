"""Training steps in FP8 that must have the same bits, and AdamW on shards with bf16 moments.

`torchrun fp8_steps_run.py FOLDER FIRST EVERY [together]` writes `FOLDER/faults.json`, an empty
list if there are none.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.ranks import Ranks, gather_json, start_ranks, stop_ranks
from parallel.shards import box_of
from tests.parallel.fp8 import fp8_models
from tests.parallel.mesh.checkpoint_run import Run
from tests.parallel.mesh.mesh_run import wholes
from train.optim.bf16_moments import Bf16MomentsAdamW


def trained(case: fp8_models.Case, ranks: Ranks) -> dict[str, Tensor]:
    """Losses, gradient norms and weights of two steps."""
    run = Run(case.settings(ranks.world), case.name, ranks)
    done = [run.step(1), run.step(2)]
    state = {"curve": torch.tensor([[each.loss, each.grad_norm] for each in done])}
    return state | wholes(dict(run.model.named_parameters()))


def changed(case: fp8_models.Case, ranks: Ranks) -> list[str]:
    """Differences from the run with default settings."""
    same = fp8_models.TOGETHER if "together" in sys.argv else fp8_models.SAME
    runs = [trained(replace(case, parallel=case.parallel | more), ranks) for more in same]
    return [
        f"{same[i]}: {name}"
        for i, run in enumerate(runs)
        for name in run
        if not torch.equal(run[name], runs[0][name])
    ]


def bf16_moments(case: fp8_models.Case, ranks: Ranks) -> list[str]:
    """Shards and whole parameters, given the same gradients, take the same three steps.

    Tolerance: torch's fused update processes the last elements of a tensor without vector
    instructions, so a rounding may differ at the end of a shard, and with it, once in thousands,
    that of a moment.
    """
    model = Run(case.settings(ranks.world), case.name, ranks).model
    names = dict(model.named_parameters())
    before = wholes(names)
    copies = {name: nn.Parameter(tensor.clone()) for name, tensor in before.items()}
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
    sharded = Bf16MomentsAdamW(names.values(), **options)
    plain = Bf16MomentsAdamW(copies.values(), **options)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for name, parameter in names.items():
            grad = torch.randn(parameter.shape, generator=generator)
            copies[name].grad = grad
            assert isinstance(parameter, DTensor)
            local = grad[box_of(parameter).slices()].contiguous()
            mesh, placements = parameter.device_mesh, parameter.placements
            shape, stride = parameter.shape, parameter.stride()
            parameter.grad = DTensor.from_local(
                local, mesh, placements, run_check=False, shape=shape, stride=stride
            )
        sharded.step(), plain.step()
    found, after = [], wholes(names)
    for name, parameter in names.items():
        moment = sharded.state[parameter]["exp_avg_sq"]
        if moment.dtype != torch.bfloat16 or box_of(moment) != box_of(parameter):
            found.append(f"{name}: a moment is {moment.dtype} {box_of(moment)}")
        difference = (after[name] - copies[name]).norm()
        if difference > 1e-4 * (copies[name] - before[name]).norm():
            found.append(f"{name}: {difference:.1e}")
    return found


if __name__ == "__main__":
    the_ranks = start_ranks(threads=1)
    faults = []
    for one in fp8_models.STEPS[the_ranks.world][int(sys.argv[2]) :: int(sys.argv[3])]:
        found = changed(one, the_ranks) + bf16_moments(one, the_ranks)
        for rank, listed in enumerate(gather_json(found)):
            faults += [f"{one.name}: rank {rank}: {each}" for each in listed]
    if the_ranks.is_first:
        (Path(sys.argv[1]) / "faults.json").write_text(json.dumps(faults))
    stop_ranks()
