"""Further requirements on dispatchers; each check returns the faults on this rank."""

import gc
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import models.moe
from configs.dispatch import DispatchConfig
from configs.errors import UserError
from configs.model import MoEConfig
from models.moe import Experts, ExpertsFn, Rows
from models.step_context import LayerContext
from parallel.dispatch.factory import dispatcher_maker
from parallel.dispatch.routed import RoutedDispatcher
from parallel.dispatch.sync_free import SyncFree
from tests.parallel.dispatch.no_host_copies import HostCopy, no_host_copies
from tests.parallel.memory.live_memory import LiveMemory
from tests.step_contexts import layer_context, layer_step, next_microbatch, totals_of

T, D, K = 24, 32, 2


def layer(options: DispatchConfig, **moe: object) -> tuple[RoutedDispatcher, Experts]:
    """A dispatcher and this rank's experts, two per rank."""
    ranks = dist.get_world_size()
    assert dist.group.WORLD is not None
    dispatcher = dispatcher_maker(2 * ranks, dist.group.WORLD, options)()
    assert isinstance(dispatcher, RoutedDispatcher)
    torch.manual_seed(dist.get_rank())
    experts = Experts(D, MoEConfig(n_experts=2, top_k=1, d_expert=16, **moe))  # type: ignore[arg-type]
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return dispatcher, experts


def context_of_layer() -> LayerContext:
    """The layer's microbatch in a training step; without one every dispatcher is exact."""
    return layer_context(2 * dist.get_world_size())


def batch(skewed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(T, D, requires_grad=True)
    scores_TE = torch.rand(T, 2 * dist.get_world_size())
    if skewed:
        scores_TE[:, :2] += 1
    weights, ids = scores_TE.topk(K, 1)
    return x, ids, weights.requires_grad_()


def device_gemm(x: Tensor, w: Tensor, ends: Tensor, counts: Tensor) -> Tensor:
    """Use the implementation of `grouped_gemm_nt` on CUDA, whose group ends stay on the device. (On
    a CPU Phalanx multiplies in a loop that reads them, which is faster there.)"""
    return torch._grouped_mm(x, w.transpose(-2, -1), offs=ends.to(torch.int32))


def forward_and_backward(options: DispatchConfig, in_step: bool = True, **moe: object) -> None:
    dispatcher, experts = layer(options, **moe)
    x, ids, weights = batch()
    context = context_of_layer() if in_step else None
    seed, beside = torch.randn(T, D), torch.nn.Linear(D, D)
    with patch.object(models.moe, "grouped_gemm_nt", device_gemm), no_host_copies():
        y = dispatcher.run(x, ids, weights, experts, lambda: beside(x), context)
        y.backward(seed)
    assert x.grad is not None and weights.grad is not None and experts.w13.grad is not None


def sync_free_never_reads() -> list[str]:
    for options in (
        DispatchConfig(kind="sync_free"),
        DispatchConfig(kind="sync_free", chunks=2, capacity_factor=0.4),
        DispatchConfig(kind="sync_free", dispatch_dtype="fp8", combine_dtype="fp8"),
    ):
        forward_and_backward(options)
        forward_and_backward(options, expert_bias=True, activation="clamped_swiglu")
        forward_and_backward(options, weight_on="input")
    return []


def the_guard_notices_the_exact_path() -> list[str]:
    """Results of the exact dispatcher, and of the other one outside of a step."""
    found = []
    for options, in_step in (
        (DispatchConfig(), True),
        (DispatchConfig(kind="sync_free"), False),
    ):
        try:
            forward_and_backward(options, in_step)
        except HostCopy:
            continue
        found.append(f"the guard let {options.kind} read its splits")
    return found


def overflow_is_counted() -> list[str]:
    dispatcher, experts = layer(DispatchConfig(kind="sync_free", capacity_factor=0.5))
    x, ids, weights = batch(skewed=True)
    context = context_of_layer()
    dispatcher.run(x, ids, weights, experts, layer=context)
    planner, stats = dispatcher.planner, totals_of(context).dispatch
    assert isinstance(planner, SyncFree)
    ranks = dist.get_world_size()
    room = planner.capacity(T * K, K)
    wanted = (ids // 2).flatten().bincount(minlength=ranks)
    expected = int((wanted - room).clamp(min=0).sum())
    faults = []
    if not expected or int(stats.rows_without_room) != expected:
        faults.append(f"{int(stats.rows_without_room)} rows without room, not {expected}")
    if int(stats.max_rows) != int(wanted.max()):
        faults.append(f"most rows for a rank: {stats.max_rows}, not {int(wanted.max())}")
    if stats.capacity != room:
        faults.append(f"room for {stats.capacity} rows, not {room}")
    return faults


def outside_of_a_step_nothing_overflows() -> list[str]:
    """No rows are missing in a repeated step either; in a step that is not repeated, rows are
    missing."""
    dispatcher, experts = layer(DispatchConfig(kind="sync_free", capacity_factor=0.1))
    exact, _ = layer(DispatchConfig())
    x, ids, weights = batch(skewed=True)
    step = layer_step(2 * dist.get_world_size())
    limited, again = next_microbatch(step), next_microbatch(step.redo_exactly())
    faults = []
    for name, context in (("outside", None), ("redone", again), ("limited", limited)):
        for grad_mode in (torch.no_grad(), torch.enable_grad()):
            with grad_mode:
                ours = dispatcher.run(x, ids, weights, experts, layer=context)
                difference = float((ours - exact.run(x, ids, weights, experts)).abs().max())
            if (difference == 0) is (name == "limited"):
                faults.append(f"{name}: differs by {difference}")
    if not int(totals_of(limited).dispatch.rows_without_room):
        faults.append("the limited step overflows, and does not tell")
    return faults


class Exchanges(TorchDispatchMode):
    """Records when exchanges start and are waited for; `calls` counts all, `events` those of
    rows."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.events = 0, list[str]()
        self._running: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            self.calls += 1
            if args[0].shape[-1] == D:
                self.events.append("start")
                self._running.add(result.data_ptr())
        elif func is torch.ops._c10d_functional.wait_tensor.default:
            if args[0].data_ptr() in self._running:
                self._running.remove(args[0].data_ptr())
                self.events.append("wait")
        return result


def exchanges_enclose_the_experts() -> list[str]:
    """With chunks, an exchange is in flight whenever experts compute, forward and backward."""
    exchanges = Exchanges()
    events = exchanges.events

    class Mark(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: Tensor) -> Tensor:
            events.append("experts")
            return y.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            events.append("experts")
            return grad

    dispatcher, experts = layer(DispatchConfig(chunks=3))
    x, ids, weights = batch()
    with exchanges:
        y = dispatcher.run(x, ids, weights, lambda rows: Mark.apply(experts(rows)))
        half = len(events)
        y.backward(torch.randn(T, D))
    faults = []
    for name, part in (("forward", events[:half]), ("backward", events[half:])):
        under_way, at_work = 0, []
        for event in part:
            under_way += (event == "start") - (event == "wait")
            if event == "experts":
                at_work.append(under_way)
        if len(at_work) != 3 or min(at_work) < 1 or under_way:
            faults.append(f"{name}: exchanges under way while experts work: {at_work}")
    return faults


def graphs_hold_no_circles() -> list[str]:
    """Without Python's garbage collector everything is freed once the output is gone."""
    faults = []
    ways = [
        DispatchConfig(),
        DispatchConfig(chunks=2, dispatch_dtype="fp8"),
        DispatchConfig(kind="sync_free"),
    ]
    for options in fitting([*ways, TWO_LEVELS]):
        dispatcher, experts = layer(options)
        x, ids, weights = batch()
        inputs = [x, weights, *experts.parameters()]
        with LiveMemory():  # torch imports some of its modules at first use
            dispatcher.run(x, ids, weights, experts, layer=context_of_layer())
        gc.collect()
        gc.disable()
        try:
            for backward in (False, True):
                with LiveMemory() as memory:
                    y = dispatcher.run(x, ids, weights, experts, layer=context_of_layer())
                    if backward:
                        torch.autograd.grad(y, inputs, torch.ones_like(y))
                    del y
                end = time.monotonic() + 5  # gloo's threads free their tensors a little later
                while memory.now and time.monotonic() < end:
                    time.sleep(0.01)
                if memory.now:
                    faults.append(f"{options}: {memory.now} bytes left, backward {backward}")
        finally:
            gc.enable()
    return faults


def recomputation_is_right_and_experts_alone_do_not_travel() -> list[str]:
    """Recomputing the whole layer gives the same gradients. Recomputing only experts repeats no
    exchange."""
    ways = [
        DispatchConfig(),
        DispatchConfig(chunks=2),
        DispatchConfig(kind="sync_free"),
        TWO_LEVELS,
    ]
    return [fault for options in fitting(ways) for fault in recomputed(options)]


def recomputed(options: DispatchConfig) -> list[str]:
    dispatcher, experts = layer(options)
    x, ids, weights = batch()
    seed, faults = torch.randn(T, D), []

    def run(experts_fn: ExpertsFn) -> Tensor:
        return dispatcher.run(x, ids, weights, experts_fn, layer=context_of_layer())

    def again(rows: Rows) -> Tensor:
        y: Tensor = checkpoint(experts, rows, use_reentrant=False)
        return y

    ways: dict[str, Callable[[], Tensor]] = {
        "nothing": lambda: run(experts),
        "experts": lambda: run(again),
        "layer": lambda: checkpoint(run, experts, use_reentrant=False),
    }
    results, calls = {}, {}
    for name, forward in ways.items():
        with Exchanges() as spy:
            inputs = [x, weights, *experts.parameters()]
            results[name] = torch.autograd.grad(forward(), inputs, seed)
        calls[name] = spy.calls
        pairs = zip(results[name], results["nothing"], strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            faults.append(f"{options}: recomputing {name} changes gradients")
    if not calls["experts"] == calls["nothing"] < calls["layer"]:
        faults.append(f"{options}: exchanges {calls}")
    return faults


def fitting(ways: list[DispatchConfig]) -> list[DispatchConfig]:
    """The dispatchers that this number of ranks can run."""
    return [way for way in ways if way.kind != "hierarchical" or dist.get_world_size() > 1]


def one_node_has_no_two_levels() -> list[str]:
    """All ranks are detected to be on one host; the error states what to set."""
    try:
        layer(DispatchConfig(kind="hierarchical"))
    except UserError as error:
        text, ranks = str(error), dist.get_world_size()
        good = f"lie on nodes as {ranks};" in text and "parallel.dispatch.node_size" in text
        return [] if good and "\n" not in text else [text]
    return ["two levels on one node were accepted"]


TWO_LEVELS = DispatchConfig(kind="hierarchical", node_size=1)
SPECIAL: dict[str, Callable[[], list[str]]] = {
    function.__name__: function
    for function in (
        sync_free_never_reads,
        the_guard_notices_the_exact_path,
        overflow_is_counted,
        outside_of_a_step_nothing_overflows,
        exchanges_enclose_the_experts,
        graphs_hold_no_circles,
        one_node_has_no_two_levels,
        recomputation_is_right_and_experts_alone_do_not_travel,
    )
}
