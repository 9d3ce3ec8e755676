"""Runs one MoE layer on every rank of `scripts.bench_dispatch`, forward and backward, alternating
between the dispatchers. Rank 0 writes the times as JSON.

"local" is the same layer with as many rows and experts per rank but without communication: the
additional time of a dispatcher is exposed communication. The peer is torchtitan's all-to-all
dispatcher with our experts; it applies routing weights after the experts.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from configs.dispatch import DispatchConfig
from configs.model import MoEConfig
from models.moe import Dispatcher, Experts, ExpertsFn, LocalDispatcher, Rows, row_values
from models.step_context import LayerContext, LayerTotals, StepContext
from parallel.dispatch.factory import dispatcher_maker
from parallel.dispatch.routed import RoutedDispatcher
from parallel.ranks import start_ranks, stop_ranks


class Torchtitan:
    """torchtitan's `AllToAllTokenDispatcher` with our interface."""

    def __init__(self, n_experts: int, top_k: int) -> None:
        from torchtitan.distributed.utils import set_spmd_backend
        from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

        set_spmd_backend("partial_dtensor")  # its default needs torch 2.14
        config = AllToAllTokenDispatcher.Config(num_experts=n_experts, top_k=top_k)
        self.inner = AllToAllTokenDispatcher(config)
        self.inner.ep_mesh = init_device_mesh(
            "cpu", (dist.get_world_size(),), mesh_dim_names=("ep",)
        )
        self.n_experts = n_experts

    def run(
        self,
        x_TD: Tensor,
        expert_ids_TK: Tensor,
        weights_TK: Tensor,
        experts: ExpertsFn,
        shared_experts: Callable[[], Tensor] | None = None,
        layer: LayerContext | None = None,
    ) -> Tensor:
        counts_E = torch.bincount(expert_ids_TK.flatten(), minlength=self.n_experts)
        rows_RD, counts_e, state = self.inner.dispatch(x_TD, weights_TK, expert_ids_TK, counts_E)
        ones_R = torch.ones(len(rows_RD))
        done_RD = experts(Rows(rows_RD, None, ones_R, counts_e.cumsum(0), counts_e))
        y_TD: Tensor = self.inner.combine(done_RD, state, x_TD)
        return y_TD


def dispatchers(setting: dict[str, Any]) -> dict[str, Dispatcher]:
    """All compared dispatchers, by name."""
    world, n_experts = dist.get_world_size(), setting["experts"]
    node_size = 0 if setting["link"] else world // 2
    options = {
        "all_to_all": DispatchConfig(node_size=node_size),
        "all_to_all, FP8": DispatchConfig(
            node_size=node_size, dispatch_dtype="fp8", combine_grad_dtype="fp8"
        ),
        "overlapped": DispatchConfig(node_size=node_size, chunks=setting["chunks"]),
        "sync_free": DispatchConfig(kind="sync_free", node_size=node_size, capacity_factor=1.25),
        "hierarchical": DispatchConfig(kind="hierarchical", node_size=node_size),
        "hierarchical, overlapped": DispatchConfig(
            kind="hierarchical", node_size=node_size, chunks=setting["chunks"]
        ),
    }
    group = dist.group.WORLD
    assert group is not None
    found: dict[str, Dispatcher] = {"local": LocalDispatcher(n_experts // world)}
    found |= {name: dispatcher_maker(n_experts, group, o)() for name, o in options.items()}
    return found | {"torchtitan": Torchtitan(n_experts, setting["top_k"])}


class Device(torch.autograd.Function):
    """Models experts on an accelerator: waits for their time, once in forward and twice in
    backward, and leaves the processors to communication. The rows are returned unchanged."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, seconds_per_row: float) -> Tensor:
        ctx.seconds = seconds_per_row * len(rows_RD)
        time.sleep(ctx.seconds)
        return rows_RD.clone()

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return grad_RD, None


class Layer:
    """Experts and a batch of this rank; routing is random, the same in every round."""

    def __init__(self, setting: dict[str, Any]) -> None:
        world, n_experts, top_k = dist.get_world_size(), setting["experts"], setting["top_k"]
        torch.manual_seed(dist.get_rank())
        tokens, width = setting["tokens"], setting["width"]
        local = n_experts // world
        moe = MoEConfig(n_experts=local, top_k=1, d_expert=setting["d_expert"])
        experts = Experts(width, moe).bfloat16()
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        self.experts: ExpertsFn = experts
        if setting["device_ms"]:
            per_row = setting["device_ms"] / 1e3 / (tokens * top_k)
            self.experts = lambda rows: Device.apply(row_values(rows), per_row)
        self.x = torch.randn(tokens, width).bfloat16().requires_grad_()
        self.grad = torch.randn(tokens, width).bfloat16()
        self.weights, self.ids = torch.rand(tokens, n_experts).topk(top_k, 1)
        self.local_ids = torch.randint(local, (tokens, top_k))
        self.totals = LayerTotals.zeros(n_experts, self.x.device)
        """Totals of the last step."""

    def step(self, name: str, dispatcher: Dispatcher) -> tuple[float, float]:
        """Seconds of one forward and backward pass until all ranks are done, and the processor
        time of this rank, which does not depend on other load on the machine."""
        ids = self.local_ids if name == "local" else self.ids
        weights = self.weights.clone().requires_grad_()
        self.totals = LayerTotals.zeros(len(self.totals.counts_E), self.x.device)
        tokens = torch.tensor(len(self.x))
        step = StepContext(len(self.x), tokens, lambda counts: counts, (self.totals,))
        (context,) = step.microbatch().layers
        dist.barrier()
        start, busy = time.perf_counter(), time.process_time()
        y = dispatcher.run(self.x, ids, weights, self.experts, layer=context)
        y.backward(self.grad)
        busy = time.process_time() - busy
        dist.barrier()
        return time.perf_counter() - start, busy


def main(out: Path, setting: dict[str, Any]) -> None:
    ranks = start_ranks(threads=1)
    layer, found = Layer(setting), dispatchers(setting)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    sent: dict[str, list[int]] = {}
    for round_ in range(-2, setting["rounds"]):  # two rounds to warm up
        for name, dispatcher in found.items():
            seconds, busy = layer.step(name, dispatcher)
            if round_ >= 0:
                times[name].append((seconds, busy))
            if isinstance(dispatcher, RoutedDispatcher):
                stats = layer.totals.dispatch
                sent[name] = [stats.bytes, stats.bytes_between_nodes]
    total = torch.tensor(list(sent.values()))
    dist.all_reduce(total)
    if ranks.is_first:
        result = {"times": times, "bytes": dict(zip(sent, total.tolist(), strict=True))}
        out.write_text(json.dumps(result))
    stop_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
