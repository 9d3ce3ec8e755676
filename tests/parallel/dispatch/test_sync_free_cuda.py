"""The sync-free path on a CUDA device, in an NCCL group of one rank, checked in the profiler's
trace."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from configs.dispatch import DispatchConfig
from configs.model import MoEConfig
from models.moe import Experts
from models.step_context import LayerContext
from parallel.dispatch.factory import dispatcher_maker
from tests.step_contexts import layer_context

pytestmark = pytest.mark.gpu


@pytest.fixture
def ranks() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_no_copy_to_the_host(ranks: dist.ProcessGroup) -> None:
    torch.manual_seed(0)
    dispatcher = dispatcher_maker(16, ranks, DispatchConfig(kind="sync_free"))()
    experts = Experts(256, MoEConfig(n_experts=16, top_k=1, d_expert=128)).cuda().bfloat16()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights, ids = torch.rand(512, 16, device="cuda").topk(4, 1)
    weights.requires_grad_()
    contexts = [layer_context(16, "cuda") for _ in range(2)]  # without one the exact path is used

    def step(context: LayerContext) -> None:
        dispatcher.run(x, ids, weights, experts, layer=context).sum().backward()

    step(contexts[0])  # NCCL and Triton warm up
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        torch.cuda.set_sync_debug_mode("error")
        step(contexts[1])
        torch.cuda.set_sync_debug_mode("default")
    names = [event.key for event in trace.key_averages()]
    assert not [name for name in names if "DtoH" in name], names
    assert [name for name in names if "alltoall" in name.lower()], names
