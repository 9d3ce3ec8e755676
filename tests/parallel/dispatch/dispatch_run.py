"""Every dispatcher on the started number of ranks, against plain loops.

Started by the tests as `torchrun ... dispatch_run.py FILE.json`; all cases share one start. FILE
maps the name of a dispatcher to the faults found, an empty list if there are none.

Cases are random, with a seed that all ranks share. Each rank generates every rank's tokens and all
experts, so it can compute its results without a dispatcher.
"""

import json
import random
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from configs.dispatch import DispatchConfig
from configs.model import MoEConfig
from models.moe import Experts
from models.step_context import DispatchStats
from parallel.dispatch.factory import dispatcher_maker
from parallel.dispatch.routed import RoutedDispatcher
from parallel.ranks import gather_json, start_ranks, stop_ranks
from tests.parallel.dispatch import deep_ep_stand_in
from tests.parallel.dispatch.dispatch_oracle import Fp8, reference_dispatch
from tests.parallel.dispatch.dispatch_special import SPECIAL
from tests.step_contexts import layer_context, totals_of

TOLERANCE = 1e-5
"""||difference|| / ||reference|| in fp32: sums in another order."""
ROUNDED = 3e-3
"""Tolerance for results that are rounded to FP8: a value midway between two FP8 numbers may be
rounded either way, a difference of 6 percent. Without the rounding the difference would be ten
times this tolerance."""
BF16 = 3e-2
"""Tolerance for bf16 against fp32 of the same inputs: some roundings of 2^-9, and sums of few terms
that nearly cancel."""


@dataclass(frozen=True)
class Case:
    """A batch for every rank."""

    seed: int
    tokens: tuple[int, ...]
    top_k: int
    moe: MoEConfig
    width: int
    router: str

    def __str__(self) -> str:
        return (
            f"seed {self.seed}: tokens {self.tokens}, top {self.top_k} of {self.moe.n_experts}, "
            f"width {self.width}, {self.router}, {self.moe.weight_on}, bias {self.moe.expert_bias}"
        )


def draw(seed: int, ranks: int, even: bool) -> Case:
    """A random case. even: all ranks have the same number of tokens."""
    rng = random.Random(seed)
    local = rng.choice([1, 2, 3, 5])
    n_experts = local * ranks
    top_k = rng.choice([1, 2, min(3, n_experts), n_experts])
    counts = [rng.choice([0, 1, 2, 7, 13, 31]) for _ in range(ranks)]
    if even:
        counts = [rng.choice([1, 2, 7, 13])] * ranks
    moe = MoEConfig(
        n_experts=n_experts,
        top_k=min(top_k, n_experts),
        d_expert=rng.choice([1, 8, 17]),
        weight_on=rng.choice(["output", "output", "input"]),
        expert_bias=rng.random() < 0.4,
        activation=rng.choice(["swiglu", "clamped_swiglu"]),
    )
    router = rng.choice(["even", "skewed", "one expert", "last rank", "not the first rank"])
    return Case(seed, tuple(counts), moe.top_k, moe, rng.choice([5, 37, 128, 131, 257]), router)


def choices(case: Case, generator: torch.Generator, n_tokens: int, ranks: int) -> Tensor:
    """Distinct experts for every token, `[T, K]`."""
    n, local = case.moe.n_experts, case.moe.n_experts // ranks
    score_TE = torch.rand(n_tokens, n, generator=generator)
    if case.router == "skewed":
        score_TE += 3 * torch.rand(n, generator=generator) ** 4
    elif case.router == "one expert":
        score_TE[:, min(2, n - 1)] += 9
    elif case.router == "last rank":
        score_TE[:, -local:] += 9
    elif case.router == "not the first rank":
        score_TE[:, :local] -= 9
    return score_TE.topk(case.top_k, 1).indices


class Batch:
    """Inputs of all ranks, experts and the output's gradient, the same on every rank."""

    def __init__(self, case: Case, ranks: int, dtype: torch.dtype = torch.float32) -> None:
        g = torch.Generator().manual_seed(case.seed)
        self.case, self.dtype = case, dtype
        self.x = [torch.randn(n, case.width, generator=g).to(dtype) for n in case.tokens]
        self.ids = [choices(case, g, n, ranks) for n in case.tokens]
        self.weights = [torch.rand(n, case.top_k, generator=g) for n in case.tokens]
        self.grads = [torch.randn(n, case.width, generator=g).to(dtype) for n in case.tokens]
        self.beside = torch.randn(case.width, case.width, generator=g)
        self.experts = Experts(case.width, case.moe)
        for parameter in self.experts.parameters():
            value = torch.randn(parameter.shape, generator=g) * case.width**-0.5
            parameter.data = value.to(dtype).float()

    def local_experts(self, rank: int, ranks: int) -> Experts:
        moe = self.case.moe
        mine = Experts(self.case.width, replace(moe, n_experts=moe.n_experts // ranks, top_k=1))
        for name, parameter in self.experts.named_parameters():
            part = parameter.detach().chunk(ranks)[rank].clone().to(self.dtype)
            getattr(mine, name).data = part
        return mine


@cache
def reference(
    case: Case, rank: int, ranks: int, dtype: torch.dtype, fp8: Fp8, per_node: int
) -> dict[str, tuple[Tensor, float]]:
    """The reference's output, gradients of this rank's inputs and of its experts; each with the
    smallest norm that errors are relative to.

    Every rank has all experts and computes its own tokens with them; the ranks then sum the
    gradients of experts.
    """
    batch = Batch(case, ranks, dtype)
    for parameter in batch.experts.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x = batch.x[rank].float().clone().requires_grad_()
    w = batch.weights[rank].clone().requires_grad_()
    seed = batch.grads[rank].float()
    y = reference_dispatch(x, batch.ids[rank], w, batch.experts, fp8, per_node)
    y_norm, y = float(y.detach().norm()), y + x @ batch.beside
    if len(x):
        y.backward(seed)
    zero = torch.zeros_like
    # a scalar product of a row of y and one of the gradient, whose terms may cancel
    terms = 0.1 * y_norm * float(seed.norm())
    result: dict[str, tuple[Tensor, float]] = {
        "y": (y.detach(), 0.0),
        "grad of x": (zero(x) if x.grad is None else x.grad, 0.0),
        "grad of weights": (zero(w) if w.grad is None else w.grad, terms),
    }
    for name, parameter in batch.experts.named_parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        result[f"grad of {name}"] = parameter.grad.chunk(ranks)[rank], 0.0
    return result


def distributed(
    batch: Batch, rank: int, ranks: int, options: DispatchConfig
) -> tuple[dict[str, Tensor], DispatchStats]:
    """The same results from a dispatcher, and its statistics."""
    assert dist.group.WORLD is not None
    dispatcher = dispatcher_maker(batch.case.moe.n_experts, dist.group.WORLD, options)()
    assert isinstance(dispatcher, RoutedDispatcher)
    experts = batch.local_experts(rank, ranks)
    x = batch.x[rank].clone().requires_grad_()
    w = batch.weights[rank].clone().requires_grad_()
    beside = batch.beside.to(batch.dtype)
    context = layer_context(batch.case.moe.n_experts)
    y = dispatcher.run(x, batch.ids[rank], w, experts, lambda: x @ beside, context)
    assert y.dtype == x.dtype and y.shape == x.shape
    y.backward(batch.grads[rank])
    assert x.grad is not None and w.grad is not None
    result = {"y": y.detach(), "grad of x": x.grad, "grad of weights": w.grad}
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None, name
        result[f"grad of {name}"] = parameter.grad
    return result, totals_of(context).dispatch


def check(
    case: Case, options: DispatchConfig, tolerance: float, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Faults of one dispatcher in one case, on this rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batch = Batch(case, ranks, dtype)
    wires = ("dispatch_dtype", "combine_dtype", "combine_grad_dtype", "dispatch_grad_dtype")
    fp8 = Fp8(*(getattr(options, wire) == "fp8" for wire in wires))
    two_levels = options.kind == "hierarchical"
    per_node = case.moe.n_experts // ranks * options.node_size if two_levels else 0
    ours, stats = distributed(batch, rank, ranks, options)
    faults = []
    for name, (expected, least) in reference(case, rank, ranks, dtype, fp8, per_node).items():
        difference = ours[name].double() - expected.double()
        error = float(difference.norm() / expected.double().norm().clamp(min=max(least, 1e-30)))
        if not error <= tolerance and not float(difference.abs().max()) < 1e-7:
            faults.append(f"{name}: {error:.1e}")
    if options.kind != "deepep":
        faults += miscounted(batch, options, stats)
    return [f"rank {rank}: {case}: {fault}" for fault in faults]


def miscounted(batch: Batch, options: DispatchConfig, stats: DispatchStats) -> list[str]:
    """Faults in the numbers of rows and bytes, compared with an independent count."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    local, m = batch.case.moe.n_experts // ranks, options.node_size or ranks
    owner = [ids // local for ids in batch.ids]  # of every choice of every rank
    want = {
        "rows_sent": int((owner[rank] != rank).sum()),
        "rows_received": sum(int((of_rank == rank).sum()) for of_rank in owner),
    }
    if options.kind != "sync_free":
        away = [r for r in range(ranks) if r // m != rank // m]
        leave = int((owner[rank] // m != rank // m).sum())
        come = sum(int((owner[r] == rank).sum()) for r in away)
        extra = 4, 4  # the routing weight and, in backward, its gradient
        if options.kind == "hierarchical":
            nodes = [[set((row // m).tolist()) for row in of_rank] for of_rank in owner]
            once = sum(len(visited - {rank // m}) for visited in nodes[rank])
            assert once <= leave
            leave, extra = once, (8 * batch.case.top_k, 4 * batch.case.top_k)
            come = sum(
                rank // m in visited for r in away if r % m == rank % m for visited in nodes[r]
            )
        width = batch.case.width
        size = {"compute": 4 * width, "fp8": width + 4 * -(-width // 128)}
        want["bytes_between_nodes"] = leave * (
            size[options.dispatch_dtype] + size[options.combine_grad_dtype] + extra[0]
        ) + come * (size[options.combine_dtype] + size[options.dispatch_grad_dtype] + extra[1])
    found = {name: int(getattr(stats, name)) for name in want}
    return [f"{name} is {found[name]}, not {n}" for name, n in want.items() if found[name] != n]


def in_fp8(options: DispatchConfig, both_ways: bool = False) -> DispatchConfig:
    """FP8 for rows sent to experts, or for all exchanges."""
    out = replace(options, dispatch_dtype="fp8", combine_grad_dtype="fp8")
    return replace(out, combine_dtype="fp8", dispatch_grad_dtype="fp8") if both_ways else out


def variants(ranks: int) -> dict[str, tuple[DispatchConfig, float, torch.dtype]]:
    """Every dispatcher that runs on this number of ranks, with its tolerance and the compute
    dtype."""
    fp32, exact = torch.float32, DispatchConfig()
    no_overflow = DispatchConfig(kind="sync_free", capacity_factor=float(ranks))
    found: dict[str, tuple[DispatchConfig, float, torch.dtype]] = {
        "all_to_all": (replace(exact, node_size=1), TOLERANCE, fp32),
        "all_to_all-bf16": (exact, BF16, torch.bfloat16),
        "all_to_all-fp8": (in_fp8(exact), TOLERANCE, fp32),
        "all_to_all-fp8-both-ways": (in_fp8(exact, True), ROUNDED, fp32),
        "overlapped": (DispatchConfig(chunks=3), TOLERANCE, fp32),
        "sync_free": (no_overflow, TOLERANCE, fp32),
        "sync_free-overlapped": (replace(no_overflow, chunks=2), TOLERANCE, fp32),
        "sync_free-fp8-both-ways": (in_fp8(no_overflow, True), ROUNDED, fp32),
        "deepep": (DispatchConfig(kind="deepep"), BF16, torch.bfloat16),
    }
    for m in (1, 2):
        if ranks % m == 0 and ranks // m > 1:
            two_levels, name = DispatchConfig(kind="hierarchical", node_size=m), f"hierarchical-{m}"
            found[name] = two_levels, TOLERANCE, fp32
            found[f"{name}-fp8"] = in_fp8(two_levels), TOLERANCE, fp32
            found[f"{name}-fp8-both-ways"] = in_fp8(two_levels, True), ROUNDED, fp32
            found[f"{name}-overlapped"] = replace(two_levels, chunks=2), TOLERANCE, fp32
    if ranks == 4:
        found["all_to_all-between-nodes"] = (replace(exact, node_size=2), TOLERANCE, fp32)
    return found


def sweep(seeds: int, options: DispatchConfig, tolerance: float, dtype: torch.dtype) -> list[str]:
    """Faults of one dispatcher in this many cases."""
    ranks, faults = dist.get_world_size(), []
    for seed in range(seeds):
        case = draw(1000 * ranks + seed, ranks, even=options.kind in ("sync_free", "deepep"))
        faults += check(case, options, tolerance, dtype)
    return faults


def main(out: Path, seeds: int, names: list[str]) -> None:
    ranks = start_ranks(threads=1)
    torch.manual_seed(0)
    sys.modules["deep_ep"] = deep_ep_stand_in
    checks: dict[str, Callable[[], list[str]]] = {
        name: partial(sweep, seeds, *setting) for name, setting in variants(ranks.world).items()
    }
    results = {}
    checks |= SPECIAL
    for name in names:
        try:
            faults = checks[name]()
        except Exception:  # reported by the test; other ranks may wait and time out
            faults = [traceback.format_exc()]
        results[name] = [fault for each in gather_json(faults) for fault in each]
    if ranks.is_first:
        out.write_text(json.dumps(results))
    stop_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
