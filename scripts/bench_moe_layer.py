"""`python -m scripts.bench_moe_layer`: an MoE layer against its bare expert GEMMs and other layers.

All run on the same weights: our layer, transformers' Qwen3 MoE block with each of its
implementations, and torchtitan's MoE layer; each alternates with the matrix products of its experts
alone (rows already sorted, outputs already allocated: no layer with the same products can be
faster). Before timing, every layer's output is compared with ours.

Weights and tokens are random. Every call has different tokens, which share a component, so that
experts get unequal numbers of rows, different in every call, as in training. On a CPU that is slow
for layers that call oneDNN with ever new sizes (`kernels.grouped_gemm.grouped_gemm_cpu`), so layers
do not alternate with each other, which would evict each other's code. `--same-tokens` disables all
this. The bare products always have the sizes of the first tokens.

T tokens, D model width, F expert width, E experts, K experts per token.
"""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from configs.command_line import CommandParser
from configs.model import AttentionConfig, ModelConfig, MoEConfig
from kernels.moe.permute import permutation
from models.moe import MoE
from parallel.allocator import keep_freed_memory, restart_without_thread_cache


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer."""

    d_model: int
    d_expert: int
    n_experts: int
    top_k: int


SHAPES = {
    "demo": Shape(256, 256, 8, 2),
    "small": Shape(1024, 512, 32, 4),
    "mixtral/4": Shape(1024, 3584, 8, 2),
    "qwen3-30b/4": Shape(2048, 768, 32, 8),
}
"""The last two have a quarter of the width or of the experts, to limit a CPU's memory and time."""

SHARED = 0.3
"""Size of the component that the tokens of a call share, relative to the rest."""

WARM_UP, WARM_UP_S = 5, 8.0
"""Minimum warm-up rounds and seconds: a layer that uses few sizes has compiled them by then."""
Step = Callable[[], object]
Layer = Callable[[Tensor], Tensor]
Tokens = Callable[[], Tensor]


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = CommandParser(prog="python -m scripts.bench_moe_layer", description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="default 2048")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="default bf16")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds (default 10)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--same-tokens", action="store_true", help="in every call")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # for all layers, as in training; likewise the thread cache
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, torch {torch.__version__}, "
        f"{options.threads} thread(s), {options.tokens} {'same' if options.same_tokens else 'new'} "
        f"tokens a call, {options.dtype}; medians of {options.rounds} rounds\n"
    )
    print("| layer | pass | implementation | ms | times the bare GEMMs |")
    print("|---|---|---|---|---|")
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    for name in options.shapes:
        tokens = tokens_of(SHAPES[name], options.tokens, dtype, options.same_tokens)
        for line in measure(name, SHAPES[name], tokens, options.rounds):
            print(line, flush=True)


def tokens_of(shape: Shape, n_tokens: int, dtype: torch.dtype, same: bool) -> Tokens:
    """A function that returns `[1, T, D]`, the same or different each time."""
    random = torch.Generator().manual_seed(1)

    def make() -> Tensor:
        shared = SHARED * torch.randn(shape.d_model, generator=random)
        x = torch.randn(1, n_tokens, shape.d_model, generator=random)
        return x.add_(shared).to(dtype)

    first = make()
    return (lambda: first) if same else make


def measure(name: str, shape: Shape, tokens: Tokens, rounds: int) -> list[str]:
    """Lines of the table for one layer."""
    torch.manual_seed(0)
    x = tokens()
    dtype = x.dtype
    layer = our_layer(shape, dtype)
    layers = {"ours": layer_of(layer), **transformers_layers(layer, shape)}
    layers["torchtitan"] = torchtitan_layer(layer, shape)
    with torch.no_grad():
        outputs = {peer: function(x) for peer, function in layers.items()}
    for peer, output in outputs.items():
        difference = float((output - outputs["ours"]).norm() / output.norm())
        # transformers' router rounds its logits to bf16, which changes the experts of a few tokens;
        # torchtitan's products are always bf16
        limit = 0.1 if dtype == torch.bfloat16 else 1e-2 if peer == "torchtitan" else 1e-5
        if difference > limit:
            raise RuntimeError(f"{peer} computes something else: {difference:.2g}")
    lines = []
    bare = bare_gemms(layer, shape, x[0])
    for backward in (False, True):
        which = "forward + backward" if backward else "forward"
        for peer, function in layers.items():
            seconds = beside(bare[backward], partial(call, function, tokens, backward), rounds)
            median = statistics.median(layer for _, layer in seconds)
            ratio = statistics.median(layer / products for products, layer in seconds)
            lines.append(f"| {name} | {which} | {peer} | {median * 1e3:.2f} | {ratio:.2f} |")
    return lines


def beside(bare: Step, layer: Callable[[], Step], rounds: int) -> list[tuple[float, float]]:
    """Seconds of both in every round; creating the layer's step is not timed."""
    seconds = []
    begin, warming_up = time.perf_counter(), 0
    while warming_up < WARM_UP or time.perf_counter() - begin < WARM_UP_S:
        bare()
        layer()()
        warming_up += 1
    for _ in range(rounds):
        step = layer()
        start = time.perf_counter()
        bare()
        between = time.perf_counter()
        step()
        seconds.append((between - start, time.perf_counter() - between))
    return seconds


def call(layer: Layer, tokens: Tokens, backward: bool) -> Step:
    """A pass over the layer; with `backward` the gradients of x and of every weight."""
    x = tokens()
    if not backward:
        return torch.no_grad()(partial(layer, x))
    x.requires_grad_()
    grad = torch.randn_like(x)

    def both() -> None:
        layer(x).backward(grad)
        x.grad = None

    return both


def our_layer(shape: Shape, dtype: torch.dtype) -> MoE:
    """A layer like Qwen3's: softmax scores, normalized weights, no shared expert."""
    moe = MoEConfig(
        n_experts=shape.n_experts, top_k=shape.top_k, d_expert=shape.d_expert,
        score_func="softmax", norm_top_k=True,
    )  # fmt: skip
    attention = AttentionConfig(n_heads=1, head_dim=64)  # not part of the layer
    model = ModelConfig(
        vocab_size=1, d_model=shape.d_model, n_layers=1, attention=attention, moe=moe
    )
    layer = MoE(model).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    layer.router.float_bias()
    return layer


def layer_of(layer: MoE) -> Layer:
    """Ours for `[1, T, D]`, with gradients freed once computed (as the peers')."""

    def run(x: Tensor) -> Tensor:
        _free(layer)
        y: Tensor = layer(x[0])[None]
        return y

    return run


def transformers_layers(layer: MoE, shape: Shape) -> dict[str, Layer]:
    """transformers' block with each of its implementations for CPUs."""
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    layers = {}
    for implementation in ("eager", "grouped_mm"):
        config = Qwen3MoeConfig(
            hidden_size=shape.d_model, moe_intermediate_size=shape.d_expert,
            num_experts=shape.n_experts, num_experts_per_tok=shape.top_k, norm_topk_prob=True,
        )  # fmt: skip
        config._experts_implementation = implementation
        block = Qwen3MoeSparseMoeBlock(config)
        experts = layer.experts
        block.gate.weight = nn.Parameter(layer.router.weight.detach())
        block.experts.gate_up_proj = nn.Parameter(experts.w13.detach().flatten(1, 2))
        block.experts.down_proj = nn.Parameter(experts.w2.detach())
        layers[f"transformers, {implementation}"] = _freeing(block)
    return layers


def torchtitan_layer(layer: MoE, shape: Shape) -> Layer:
    """torchtitan's layer, whose router has the same softmax scores."""
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import (
        GroupedExperts,
        RoutedExperts,
        TokenChoiceTopKRouter,
    )
    from torchtitan.models.common.moe import (
        MoE as TitanMoE,
    )
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    D, F, E, K = shape.d_model, shape.d_expert, shape.n_experts, shape.top_k
    block = TitanMoE(
        TitanMoE.Config(
            num_experts=E,
            routed_experts=RoutedExperts.Config(
                inner_experts=GroupedExperts.Config(dim=D, hidden_dim=F, num_experts=E),
                token_dispatcher=LocalTokenDispatcher.Config(num_experts=E, top_k=K),
            ),
            router=TokenChoiceTopKRouter.Config(
                num_experts=E, top_k=K, score_func="softmax", route_norm=True,
                gate=Linear.Config(in_features=D, out_features=E),
            ),
            load_balance_coeff=None,
        )
    )  # fmt: skip
    w13 = layer.experts.w13.detach()
    experts = block.routed_experts.inner_experts
    experts.w1_EFD = nn.Parameter(w13[:, 0].contiguous())
    experts.w3_EFD = nn.Parameter(w13[:, 1].contiguous())
    experts.w2_EDF = nn.Parameter(layer.experts.w2.detach())
    block.router.gate.weight = nn.Parameter(layer.router.weight.detach())
    return _freeing(block)


def bare_gemms(layer: MoE, shape: Shape, x_TD: Tensor) -> dict[bool, Step]:
    """The experts' products alone: two per expert forward (False), six with backward (True)."""
    with torch.no_grad():
        ids_TK, _ = layer.router(x_TD)
    counts = permutation(ids_TK, shape.n_experts).counts_E.tolist()
    R, D, F = ids_TK.numel(), shape.d_model, shape.d_expert
    w13, w2 = layer.experts.w13.detach().flatten(1, 2), layer.experts.w2.detach()

    def rows(width: int) -> list[Tensor]:
        return list(torch.randn(R, width).to(x_TD.dtype).split(counts))

    x, gate_up, h, y, dx, dh = (rows(width) for width in (D, 2 * F, F, D, D, F))
    dw13, dw2 = torch.empty_like(w13), torch.empty_like(w2)

    def forward() -> None:
        for e in range(shape.n_experts):
            torch.mm(x[e], w13[e].T, out=gate_up[e])
        for e in range(shape.n_experts):
            torch.mm(h[e], w2[e].T, out=y[e])

    def both() -> None:
        forward()
        for e in range(shape.n_experts):
            torch.mm(y[e], w2[e], out=dh[e])
            torch.mm(y[e].T, h[e], out=dw2[e])
        for e in range(shape.n_experts):
            torch.mm(gate_up[e], w13[e], out=dx[e])
            torch.mm(gate_up[e].T, x[e], out=dw13[e])

    return {False: forward, True: both}


def _freeing(block: nn.Module) -> Layer:
    def run(x: Tensor) -> Tensor:
        _free(block)
        y: Tensor = block(x)
        return y

    return run


def _free(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.grad = None


if __name__ == "__main__":
    restart_without_thread_cache()
    main()
