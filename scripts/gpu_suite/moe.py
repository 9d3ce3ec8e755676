"""Mixture of experts: permutation of rows against a copy, the router, and the whole layer.

A copy moves as many bytes as the operation must: a gather reads every token once and writes its
rows, a combine reads all rows and writes every token once. In addition to its time a layer shows
peak memory above its inputs and weights, copies to the host (none are expected), and the share of
device time that moves rows instead of multiplying them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from configs.model import AttentionConfig, ModelConfig, MoEConfig
from kernels.moe import permute
from kernels.moe.permute import Permutation
from kernels.moe.router import RouterOptions, route, route_backward_reference, route_reference
from models.moe import MoE
from scripts.gpu_suite.harness import Check, Place, Timing
from scripts.gpu_suite.harness import measure as take_time

ROWS = [(32768, 2048, 128, 8), (16384, 7168, 256, 8), (16384, 4096, 8, 2)]
"""Tokens, width, experts, choices."""
LAYERS = {
    "Qwen3-30B": (32768, 2048, 768, 128, 8),
    "DeepSeek-V3, 32 local experts": (16384, 7168, 2048, 32, 8),
    "Mixtral": (16384, 4096, 14336, 8, 2),
}
"""Tokens, width, width of an expert, experts, choices."""
MOVEMENT = ("_rank", "_place", "_gather", "_combine", "Memcpy DtoD")
"""Names of device kernels, as Triton sets them."""
OPERATIONS = ("permutation", "gather_rows", "combine_rows")
"""The corresponding operations, without a device."""


@dataclass(frozen=True)
class LayerTiming(Timing):
    """A layer's time and other costs."""

    peak_mib: float = 0.0
    host_copies: int = 0
    movement: float = 0.0
    fullest: float = 0.0
    """Rows of the expert with the most, over the mean."""

    def lines(self) -> Iterator[str]:
        """Adds a row with the costs of ours."""
        yield from super().lines()
        yield (
            f"| {self.case} | ours: {self.host_copies} copies to the host, peak "
            f"{self.peak_mib:,.0f} MiB, {self.movement:.1%} of the time moves rows; fullest expert "
            f"{self.fullest:.2f} of the mean | | | |"
        )


def check(place: Place) -> Iterator[Check]:
    """Compare all operations on the device with their references on the CPU."""
    torch.manual_seed(0)
    for tokens, experts, top_k in ((0, 4, 2), (1, 256, 8), (1000, 256, 8), (777, 5, 3)):
        ids = torch.randint(0, experts + 1, (tokens, top_k))  # some choices are no expert
        ids[: tokens // 3] = 0
        for align in (1, 128):
            yield from _check_rows(place, ids, experts, align)
    rules = (
        (128, RouterOptions(8, True)),
        (256, RouterOptions(8, False, 8, 4, True, 2.5)),
        (8, RouterOptions(2, True)),
    )
    for experts, rule in rules:
        yield from _check_router(place, experts, rule)
    yield from _check_layer(place)


def _check_rows(place: Place, ids: Tensor, experts: int, align: int) -> Iterator[Check]:
    case, width = f"{list(ids.shape)} of {experts}, align {align}", 300
    reference = permute.permutation_reference(ids, experts, align)
    ours = permute.permutation(ids.to(place.device), experts, align)
    there = Permutation(*(part.cpu() for part in ours))
    n_slots = len(reference.order_P)
    wrong = sum(int((a != b).sum()) for a, b in zip(there[1:], reference[1:], strict=True)) + int(
        (there.order_P[:n_slots] != reference.order_P).sum()
    )
    wrong += int((there.order_P[n_slots:] != -1).sum())
    yield Check(f"permutation {case}: numbers that differ", wrong, 0)
    x = torch.randn(len(ids), width).bfloat16()
    on_device = x.to(place.device)
    rows = permute.gather_rows(on_device, ours).cpu()
    expected = permute.gather_rows_reference(x, there)
    yield Check(f"gather_rows {case}: elements that differ", int((rows != expected).sum()), 0)
    top_k = ids.shape[1]
    y = permute.combine_rows(rows.to(place.device), ours, top_k)
    # the order of a sum in fp32 before it is rounded to bf16
    yield Check(
        f"combine_rows {case}",
        _relative(y, permute.combine_rows_reference(rows, there, top_k)),
        1e-3,
    )


def _check_router(place: Place, experts: int, rule: RouterOptions) -> Iterator[Check]:
    case = f"router {experts} experts, {'softmax' if rule.softmax else 'sigmoid'}"
    logits, bias = torch.randn(1000, experts), torch.randn(experts) * 0.01
    logits[:, 1] = logits[:, 0]  # equals
    leaf = logits.to(place.device).requires_grad_()
    ids, weights, counts = route(leaf, bias.to(place.device), rule)
    expected = route_reference(logits, bias, rule)
    # the exponentials of a device differ in their last bit, which occasionally changes a choice
    # between neighbors
    yield Check(f"{case}: share of ids that differ", _share(ids, expected[0]), 1e-3)
    wrong = int((counts.cpu() != torch.bincount(ids.cpu().flatten(), minlength=experts)).sum())
    yield Check(f"{case}: counts that differ", wrong, 0)
    given = route_reference(logits, bias, rule, ids.cpu())[1]
    yield Check(f"{case}: weights", _relative(weights, given), 1e-6)
    grad = torch.randn(weights.shape)
    (ours,) = torch.autograd.grad(weights, leaf, grad.to(place.device))
    reference = route_backward_reference(grad, logits, ids.cpu(), rule)
    yield Check(f"{case}: gradient", _relative(ours, reference), 1e-5)


def _check_layer(place: Place) -> Iterator[Check]:
    layer = _layer(64, 96, 16, 4, False, torch.device("cpu"))
    x, grad = torch.randn(300, 64).bfloat16(), torch.randn(300, 64).bfloat16()
    results: list[list[Tensor]] = []
    for device, run in ((torch.device("cpu"), plain), (place.device, MoE.__call__)):
        layer = layer.to(device) if device.type != "cpu" else layer.float()
        dtype = torch.float32 if run is plain else torch.bfloat16
        layer = layer.to(dtype)
        layer.router.float_bias()
        leaf = x.to(device, dtype).requires_grad_()
        y = run(layer, leaf)
        leaves = [leaf, *layer.parameters()]
        results.append([y, *torch.autograd.grad(y, leaves, grad.to(device, dtype))])
    names = ["y", "dx", *(f"d{name}" for name, _ in layer.named_parameters())]
    for name, exact, ours in zip(names, *results, strict=True):
        # bf16 rounds rows, hidden values and sums: a few times 2^-9
        yield Check(f"layer, {name}", _relative(ours, exact), 2e-2)


def measure(place: Place) -> Iterator[Timing]:
    """Time layers with even and with skewed routing first, then rows and router."""
    layers = [*LAYERS.items()]
    for name, (tokens, width, hidden, experts, top_k) in layers[: 1 if place.dry_run else None]:
        if place.dry_run:
            tokens, width, hidden, experts = 64, 64, 32, 16
        for balanced in (True, False):
            layer = _layer(width, hidden, experts, top_k, balanced, place.device)
            x = torch.randn(tokens, width, device=place.device)
            # the common component makes some experts popular with all tokens
            x += 0.5 * torch.randn(1, width, device=place.device)
            case = f"{name}, {'even' if balanced else 'skewed'}"
            yield from _measure_layer(place, case, layer, x.bfloat16())
            del layer
    for tokens, width, experts, top_k in ROWS[:1] if place.dry_run else ROWS:
        if place.dry_run:
            tokens, width, experts = 64, 64, 16
        yield from _measure_rows(place, tokens, width, experts, top_k)
        yield from _measure_router(place, tokens, experts, top_k)


def _measure_rows(
    place: Place, tokens: int, width: int, experts: int, top_k: int
) -> Iterator[Timing]:
    ids = torch.rand(tokens, experts, device=place.device).topk(top_k, 1).indices
    case = f"{tokens}x{width}, {experts} experts, {top_k} choices"
    to = permute.permutation(ids, experts)
    moved = 8 * ids.numel() * 6  # read twice; inverse written, read, written; order written
    yield take_time(
        f"permutation {case}",
        {
            "ours": lambda: permute.permutation(ids, experts),
            "argsort and bincount": lambda: (
                torch.argsort(torch.argsort(ids.flatten(), stable=True)),
                torch.bincount(ids.flatten(), minlength=experts).cumsum(0),
            ),
            **_copy(moved, place),
        },
        place,
        bytes=moved,
    )
    x = torch.randn(tokens, width, device=place.device).bfloat16()
    rows = permute.gather_rows(x, to)
    moved = x.nbytes + rows.nbytes
    source = to.order_P.div(top_k, rounding_mode="floor")
    yield take_time(
        f"gather_rows {case}",
        {
            "ours": lambda: permute.gather_rows(x, to),
            "index_select": lambda: x.index_select(0, source),
            **_copy(moved, place),
        },
        place,
        bytes=moved,
    )
    yield take_time(
        f"combine_rows {case}",
        {
            "ours": lambda: permute.combine_rows(rows, to, top_k),
            "index_select and sum": lambda: (
                rows.index_select(0, to.inverse_R).view(tokens, top_k, width).sum(1)
            ),
            **_copy(moved, place),
        },
        place,
        bytes=moved,
    )
    column = torch.rand(ids.numel(), 1, device=place.device)
    yield take_time(
        f"gather_rows, width 1, {case}",
        {
            "ours": lambda: permute.gather_rows(column, to),
            "index_select": lambda: column.index_select(0, to.order_P),
        },
        place,
        bytes=8 * ids.numel(),
    )


def _measure_router(place: Place, tokens: int, experts: int, top_k: int) -> Iterator[Timing]:
    logits = torch.randn(tokens, experts, device=place.device, requires_grad=True)
    bias, rule = torch.zeros(experts, device=place.device), RouterOptions(top_k, True)
    grad = torch.randn(tokens, top_k, device=place.device)

    def step(run: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
        torch.autograd.grad(run(logits, bias, rule)[1], logits, grad)

    moved = 3 * logits.nbytes  # read forward and backward, gradient written
    yield take_time(
        f"router forward and backward {tokens} tokens, {experts} experts, {top_k} choices",
        {
            "ours": partial(step, route),
            "plain torch": partial(step, route_reference),
            **_copy(moved, place),
        },
        place,
        bytes=moved,
    )


def _measure_layer(place: Place, case: str, layer: MoE, x: Tensor) -> Iterator[Timing]:
    config = layer.router.config
    flops = 6.0 * len(x) * config.top_k * x.shape[1] * config.d_expert
    flops += 2.0 * len(x) * x.shape[1] * config.n_experts
    leaf, grad = x.clone().requires_grad_(), torch.randn_like(x)
    leaves = [leaf, *layer.parameters()]
    with torch.no_grad():
        counts = torch.bincount(layer.router(x)[0].flatten(), minlength=config.n_experts)
    fullest = float(counts.max() / counts.float().mean())

    def forward(run: Callable[[MoE, Tensor], Tensor]) -> None:
        with torch.no_grad():
            run(layer, x)

    def both(run: Callable[[MoE, Tensor], Tensor]) -> None:
        torch.autograd.grad(run(layer, leaf), leaves, grad)

    peers = {"ours": MoE.__call__, "Liger": liger, "plain torch": plain}
    for how, step, factor in (("forward", forward, 1), ("forward and backward", both, 3)):
        runs: dict[str, Callable[[], object]] = {
            name: partial(step, run) for name, run in peers.items()
        }
        timing = take_time(f"{case}, {how}", runs, place, flops=factor * flops)
        if place.compiles_only:
            continue
        peak_mib = _peak(runs["ours"], place)
        host_copies, movement = _traced(runs["ours"], place)
        yield LayerTiming(
            timing.case, timing.milliseconds, timing.flops, timing.bytes, timing.missing,
            timing.host_bound, peak_mib, host_copies, movement, fullest,
        )  # fmt: skip


def plain(layer: MoE, x_TD: Tensor) -> Tensor:
    """The layer as a loop over experts, with the counts read on the host."""
    experts, router = layer.experts, layer.router
    logits = F.linear(x_TD.float(), router.weight.float())
    given = router._given_choice(logits)
    ids, weights, counts = route_reference(logits, router.bias_E, router.options, given)
    order = ids.flatten().argsort(stable=True)
    token = order // ids.shape[1]
    parts = []
    for e, rows in enumerate(x_TD[token].split(counts.tolist())):
        gate, up = F.linear(rows, experts.w13[e].flatten(0, 1)).chunk(2, -1)
        parts.append(F.linear(F.silu(gate) * up, experts.w2[e]))
    weighted = torch.cat(parts) * weights.flatten()[order, None].to(x_TD.dtype)
    return torch.zeros_like(x_TD).index_add(0, token, weighted)


def liger(layer: MoE, x_TD: Tensor) -> Tensor:
    """Liger's experts with our router."""
    from liger_kernel.ops.fused_moe import (  # type: ignore[import-not-found, unused-ignore]
        LigerFusedMoEFunction,
    )

    ids, weights = layer.router(x_TD)
    w13, w2 = layer.experts.w13.flatten(1, 2), layer.experts.w2
    y_TD: Tensor = LigerFusedMoEFunction.apply(x_TD, w13, w2, ids.int(), weights)
    return y_TD


def _layer(
    width: int, hidden: int, experts: int, top_k: int, balanced: bool, device: torch.device
) -> MoE:
    moe = MoEConfig(n_experts=experts, top_k=top_k, d_expert=hidden, force_balance=balanced)
    attention = AttentionConfig(n_heads=1, head_dim=2)
    layer = MoE(
        ModelConfig(vocab_size=2, d_model=width, n_layers=1, attention=attention, moe=moe)
    ).to(device, torch.bfloat16)
    layer.router.float_bias()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return layer


def _copy(moved: int, place: Place) -> dict[str, Callable[[], object]]:
    source = torch.empty(max(moved // 2, 1), dtype=torch.int8, device=place.device)
    return {"copy": partial(torch.empty_like(source).copy_, source)}


def _peak(run: Callable[[], object], place: Place) -> float:
    """MiB above the memory allocated before."""
    if place.device.type != "cuda":
        return float("nan")
    torch.cuda.synchronize(place.device)
    torch.cuda.reset_peak_memory_stats(place.device)
    before = torch.cuda.memory_allocated(place.device)
    run()
    torch.cuda.synchronize(place.device)
    return (torch.cuda.max_memory_allocated(place.device) - before) / 2**20


def _traced(run: Callable[[], object], place: Place) -> tuple[int, float]:
    """Copies to the host in one run, and the share of time that moves rows."""
    cuda = place.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as trace:
        run()
        if cuda:
            torch.cuda.synchronize(place.device)
    moving, total, host_copies = 0.0, 0.0, 0
    for event in trace.key_averages():
        if not cuda:
            total += event.self_cpu_time_total
            moving += event.cpu_time_total * (event.key.removeprefix("phalanx::") in OPERATIONS)
        elif event.device_type == DeviceType.CUDA:
            total += event.self_device_time_total
            moving += event.self_device_time_total * event.key.startswith(MOVEMENT)
            host_copies += event.count * ("DtoH" in event.key)
    return host_copies, moving / total


def _share(ours: Tensor, reference: Tensor) -> float:
    return float((ours.cpu() != reference).float().mean())


def _relative(ours: Tensor, reference: Tensor) -> float:
    ours, reference = ours.detach().cpu().double(), reference.detach().cpu().double()
    return float((ours - reference).norm() / reference.norm()) if reference.norm() else 0.0
