"""The checks of `test_traps.py`: `torchrun --nproc-per-node 2 trap_run.py OUT.json`."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from models.decoder import Decoder
from models.init import initialize
from parallel.grad_norm import global_grad_norm, scale_grads
from parallel.ranks import start_ranks, stop_ranks
from parallel.shards import box_of, local_of
from tests.parallel.mesh.checkpoint_run import Run
from tests.parallel.mesh.mesh_run import whole
from tests.parallel.mesh.meshes import Case
from train.loss import loss_sum

TIMEOUT_S = 77
DENSE, EXPERT = "layers.1.attention.wq.weight", "layers.1.ffn.experts.w2"


def main(out: Path) -> None:
    ranks = start_ranks(threads=1)
    run = Run(Case("qwen3", 1, 2, 1, 2, 1).settings(), "traps", ranks)
    batch = next(run.data.step(1))
    parameters = dict(run.model.named_parameters())
    one = Decoder(run.config.model)
    initialize(one, run.config.model, run.config.run.seed)
    found: dict[str, float] = {}
    same = [torch.empty_like(local_of(parameters[EXPERT])) for _ in range(2)]
    dist.all_gather(same, local_of(parameters[EXPERT]).detach())
    found["equal shards"] = float(torch.equal(*same))
    apart = 0.0
    for name, parameter in one.named_parameters():
        if not name.endswith("norm.weight"):  # shaken
            ours = parameters[name]
            apart = max(apart, float((parameter[box_of(ours).slices()] - local_of(ours)).norm()))
    found["distance from the whole"] = apart

    one.load_state_dict({n: whole(t) for n, t in run.model.state_dict().items()})
    loss_sum(run.model, batch).backward()
    loss_sum(one, batch).backward()
    for label, name in (("dense", DENSE), ("expert", EXPERT)):
        expected = one.get_parameter(name).grad
        got = parameters[name].grad
        assert expected is not None and got is not None
        dist.all_reduce(expected)
        ratio = (whole(got) * expected).sum() / expected.square().sum()
        found[f"{label} gradient / sum over ranks"] = float(ratio)
    gradients = [whole(p.grad) for p in parameters.values() if p.grad is not None]
    norm = global_grad_norm(parameters.values(), ranks.rank)
    exact = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
    found["norm / norm of the whole"] = float(norm / exact)
    scale_grads(parameters.values(), norm, 0.5)
    found["norm after clipping"] = float(global_grad_norm(parameters.values(), ranks.rank))
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    options = group._get_backend(torch.device("cpu")).options
    found["timeout in seconds"] = options._timeout.total_seconds()
    groups = list(dist.distributed_c10d._world.pg_map)
    for group in groups:
        dist.barrier(group)  # a thread gets its name when it first runs
    found["gloo groups"] = len(groups)
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    found["gloo threads"] = names.count("pt_gloo_runloop")
    found["threads of communication"] = names.count("gloo_tcp_loop")
    if ranks.is_first:
        out.write_text(json.dumps(found))
    stop_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
