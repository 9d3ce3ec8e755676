"""Layers in FP8 on a mesh equal those of one process: operands, outputs, gradients.

`[torchrun] fp8_layers_run.py FOLDER` writes `FOLDER/faults.json`, an empty list if there are none.
Every rank also has a plain copy of the model and all tokens, and computes its expected results with
them. Layers get the same input and the same gradient of their output.

The first operands of forward and backward, quantized from these, must have the same bits.

Later operands come from sums in another order (about 1e-7). That moves a value across the midpoint
between two FP8 codes, which are 2^-3 to 2^-4 apart, about once in 1e5, and a scale by 1e-7: `FLIPS`
is ten times as many, and each only to the adjacent code.

Results: one such change moves one of K addends by 6 percent, so 1e-4 of all of them move a sum by
at most 1e-3 of its norm: `NOISE`. FP8's own error is 30 times as large.

Weight gradients: within `NOISE` for the same groups of 128 tokens; on every mesh, against fp32:
`FP8_ERROR`. One product has an error of 3.7 percent (two operands with 2.6 each); these are the
last of three products, whose operands contain the errors of those before.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import kernels.gemm.linear_fp8
import kernels.mlp.mlp_fp8
import models.fp8
from models.attention import GroupedQueryAttention, LatentAttention
from models.decoder import Decoder
from models.documents import DocumentAttention
from models.fp8 import apply_fp8
from models.layers.rope import rope_tables
from models.moe import MoE
from models.parameters import spec_of
from parallel.ranks import gather_json, start_ranks, stop_ranks
from tests.parallel.fp8 import fp8_models
from tests.parallel.mesh.checkpoint_run import Run
from tests.parallel.mesh.mesh_run import wholes

FLIPS, NOISE, FP8_ERROR = 1e-4, 1e-3, 0.12
LAYERS = ("layers.0.attention", "layers.0.ffn", "layers.1.ffn")
"""Attention, a dense feed-forward, an MoE layer with a shared expert."""
SEQUENCES, LENGTH = 4, 80
"""Divisible by 8 ranks; no rank has a multiple of 128 tokens."""
Operands = dict[str, list[tuple[Tensor, Tensor]]]


@contextmanager
def recorded() -> Iterator[Operands]:
    """The left operands of all products of dense layers, in the order of the calls."""
    found: Operands = defaultdict(list)

    def recording(name: str, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def product(a: Tensor, scales: Tensor, *rest: Any, **options: Any) -> Tensor:
            found[name].append((a.view(torch.uint8).clone(), scales.clone()))
            return call(a, scales, *rest, **options)

        return product

    with ExitStack() as stack:
        for module in (kernels.gemm.linear_fp8, kernels.mlp.mlp_fp8):
            for name in ("gemm_fp8_nt", "gemm_fp8_nn"):
                call = recording(name, getattr(module, name))
                stack.enter_context(patch.object(module, name, call))
        yield found


@dataclass
class ExpertCalls:
    """Records the operands of the experts of one layer."""

    counts: Counter[str] = field(default_factory=Counter)
    came: list[int] = field(default_factory=list)
    """Addresses of the rows received in FP8, or 0."""
    multiplied: list[int] = field(default_factory=list)
    """Addresses of the left operands of both products."""


@contextmanager
def recorded_experts() -> Iterator[ExpertCalls]:
    calls, mlp = ExpertCalls(), kernels.mlp.mlp_fp8

    def noting(note: Callable[..., None], call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            note(*args, **options)
            return call(*args, **options)

        return noted

    def came(*args: Any, rows: Any = None, groups: Any = None, **options: Any) -> None:
        if groups is not None:
            calls.came.append(0 if rows is None else rows.data.data_ptr())

    notes = [
        (mlp, "quantize_1x128_128x1_grouped", lambda *a, **o: calls.counts.update(["both"])),
        (mlp, "quantize_128x1_grouped", lambda *a, **o: calls.counts.update(["columns"])),
        (mlp, "grouped_gemm_fp8_nt", lambda a, *b, **o: calls.multiplied.append(a.data_ptr())),
        (models.fp8, "swiglu_mlp_fp8", came),
    ]
    with ExitStack() as stack:
        for owner, name, note in notes:
            call = noting(note, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, call))
        yield calls


@dataclass
class Result:
    """Results of one layer, forward and backward."""

    y_TD: Tensor
    grad_x_TD: Tensor
    operands: Operands
    weights: dict[str, Tensor]
    """Whole gradients of quantized weights and of the router by name, summed over ranks."""


class Bench:
    """A model on the mesh, its copy in one process and one without FP8, with inputs for all."""

    def __init__(self, run: Run) -> None:
        self.run, self.model, config = run, run.model, run.config
        values = wholes(dict(run.model.named_parameters()))
        values |= {name: buffer.clone() for name, buffer in run.model.named_buffers()}
        self.plain, self.exact = (_copy(config.model, values) for _ in range(2))
        apply_fp8(self.plain, config.precision.fp8)
        generator = torch.Generator().manual_seed(11)
        shape = (SEQUENCES * LENGTH, config.model.d_model)
        spread = torch.exp(torch.randn(shape, generator=generator))  # gives outliers
        self.x_TD = torch.randn(shape, generator=generator) * spread
        self.grad_TD = torch.randn(shape, generator=generator) * 1e-3
        self.positions_T = torch.arange(LENGTH).repeat(SEQUENCES) % 33
        d, place = run.mesh.parallel_dims, run.mesh.dense["tp"].get_local_rank()
        self.group = self.split(d.data_ranks)[d.data_rank(run.ranks.rank)]
        self.own = self.split(d.data_ranks * d.tp)[d.data_rank(run.ranks.rank) * d.tp + place]

    def split(self, parts: int) -> list[slice]:
        """All tokens, divided into this many parts."""
        n = len(self.x_TD) // parts
        return [slice(i * n, (i + 1) * n) for i in range(parts)]

    def run_layer(self, model: Decoder, name: str, given: slice, attended: slice) -> Result:
        """given: the tokens that enter the layer here; attended: those of this `tp` group."""
        layer, block = model.get_submodule(name), model.blocks()[int(name.split(".")[1])]
        x_TD = self.x_TD[given].clone().requires_grad_()
        inputs: tuple[Any, ...] = (x_TD,)
        if isinstance(layer, GroupedQueryAttention | LatentAttention):
            positions_T, config = self.positions_T[attended], self.run.config.model
            tables = rope_tables(positions_T, config.rope, config.attention.rope_dim)
            inputs += (positions_T, tables, DocumentAttention(positions_T.view(-1, LENGTH)))
        # FSDP2 gathers and reduces around model, block and norm
        norm = block.attention_norm if name.endswith("attention") else block.ffn_norm
        setattr(norm, "forward", lambda x: x)  # noqa: B010 (not as a method)
        setattr(block, "forward", lambda x, *rest: layer(norm(x), *rest))  # noqa: B010
        setattr(model, "forward", lambda call: call())  # noqa: B010
        with recorded() as operands:
            y_TD = model(lambda: block(*inputs))
            y_TD.backward(self.grad_TD[given])
        grads = {
            key: p.grad
            for key, p in layer.named_parameters()
            if p.grad is not None and (spec_of(f"{name}.{key}").fp8 or key == "router.weight")
        }
        if model is self.model:
            grads = wholes(grads)
        model.zero_grad()
        assert x_TD.grad is not None
        return Result(y_TD.detach(), x_TD.grad, operands, grads)

    def check(self, name: str) -> list[str]:
        """All comparisons of the layer with this name."""
        all_tokens = slice(0, len(self.x_TD))
        got = self.run_layer(self.model, name, self.own, self.group)
        right = self.run_layer(self.plain, name, all_tokens, all_tokens)
        found = _far("output", got.y_TD, right.y_TD[self.own])
        found += _far("gradient", got.grad_x_TD, right.grad_x_TD[self.own])
        if not isinstance(self.model.get_submodule(name), MoE):
            found += self._operands(name, got.operands, right.operands)
        # every rank has the same whole gradients, so one of them compares those of a layer
        if LAYERS.index(name) % self.run.ranks.world != self.run.ranks.rank:
            return found
        found += self._weights(name, got, right)
        exact = self.run_layer(self.exact, name, all_tokens, all_tokens).weights
        for key, grad in got.weights.items():
            if "router" not in key:
                found += _far(f"sum of {key}", grad, exact[key], FP8_ERROR)
        return found

    def rows_are_quantised_once(self, name: str) -> list[str]:
        """Rows received in FP8 are the first operand without change; others are quantized once
        along rows and once along columns. Backward does both for the gradient."""
        config, d = self.run.config.parallel.dispatch, self.run.mesh.parallel_dims
        fp8 = config.dispatch_dtype == "fp8" and d.ep > 1
        with recorded_experts() as calls:
            self.run_layer(self.model, name, self.own, self.group)
        n = config.chunks if d.ep > 1 else 1
        expected = {"both": n, "columns": n} if fp8 else {"both": 2 * n}
        found = [] if calls.counts == expected else [f"quantised {dict(calls.counts)}"]
        if len(calls.came) != n or (fp8 and calls.came != calls.multiplied[::2]):
            found.append("other rows are multiplied than came")
        return found

    def _weights(self, name: str, got: Result, right: Result) -> list[str]:
        """Compare with one process that is given the same groups of tokens, one after another.
        right: its result for all tokens as one group."""
        d, found, dispatch = self.run.mesh.parallel_dims, [], self.run.config.parallel.dispatch
        # another order of an expert's rows, or a second quantization, gives other scales
        ordered = dispatch.chunks == 1 and dispatch.kind != "hierarchical"
        twice = dispatch.dispatch_dtype == "fp8" and not self.run.config.precision.fp8.power_of_two
        sums: dict[int, dict[str, Tensor]] = {}
        for parts in {d.data_ranks, d.dp_replicate * d.efsdp}:
            sums[parts] = defaultdict(lambda: torch.zeros(()))
            for part in self.split(parts):
                one = right if parts == 1 else self.run_layer(self.plain, name, part, part)
                for key, grad in one.weights.items():
                    sums[parts][key] = sums[parts][key] + grad
        for key, grad in got.weights.items():
            routed = key.startswith("experts.")
            other = d.tp > 1 and any(part in key for part in ("wq_a", "wkv_a", "router"))
            if other or (routed and d.ep > 1 and (twice or not ordered)):
                continue
            parts = d.dp_replicate * d.efsdp if routed else d.data_ranks
            found += _far(f"weight gradient {key}", grad, sums[parts][key])
        return found

    def _operands(self, name: str, ours: Operands, right: Operands) -> list[str]:
        """ours, right: results of this rank's layer, and of one that has all tokens and all
        widths."""
        found = []
        if {k: len(v) for k, v in ours.items()} != {k: len(v) for k, v in right.items()}:
            return ["other products"]
        tp = self.run.mesh.dense["tp"]
        for kind, listed in ours.items():
            for i, (a, scales) in enumerate(listed):
                codes, theirs = right[kind][i]
                rows = self.own if len(a) == self.own.stop - self.own.start else self.group
                width = codes.shape[1]
                parts = 2 if name.endswith("ffn") and (kind, i) == ("gemm_fp8_nn", 1) else 1
                if a.shape[1] != width:
                    codes, theirs = (
                        torch.cat(
                            [half.chunk(tp.size(), 1)[tp.get_local_rank()]
                             for half in each.chunk(parts, 1)], 1,
                        )
                        for each in (codes, theirs)
                    )  # fmt: skip
                first = i == 0  # quantized from the given tensors
                far = _flips(a, codes[rows])
                if far > (0 if first else FLIPS):
                    found.append(f"{kind} {i}: {far:.1e} of the codes differ")
                tolerance = 0.0 if first else 1e-5
                if not torch.allclose(scales, theirs[rows], rtol=tolerance, atol=0):
                    found.append(f"{kind} {i}: scales differ")
        return found


def _copy(config: Any, values: dict[str, Tensor]) -> Decoder:
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device="cpu")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.data.copy_(values[name])
    return model


def _flips(ours: Tensor, right: Tensor) -> float:
    """Fraction of codes that differ; 1 if one differs by more than one step."""
    if ours.shape != right.shape:
        return 1.0
    apart = (ours.int() - right.int()).abs()
    zeros = (ours & 0x7F == 0) & (right & 0x7F == 0)
    apart = apart.masked_fill(zeros, 0)
    return 1.0 if apart.max() > 1 else float((apart > 0).float().mean())


def _far(what: str, ours: Tensor, right: Tensor, tolerance: float = NOISE) -> list[str]:
    if ours.shape != right.shape:
        return [f"{what}: {tuple(ours.shape)} instead of {tuple(right.shape)}"]
    error = float((ours - right).norm() / right.norm().clamp(min=1e-30))
    WORST[what.split(" ")[0]] = max(WORST[what.split(" ")[0]], error)
    return [] if error <= tolerance else [f"{what}: {error:.1e}"]


WORST: dict[str, float] = defaultdict(float)


if __name__ == "__main__":
    ranks = start_ranks(threads=1)
    faults = []
    for case in fp8_models.LAYERS[ranks.world][int(sys.argv[2]) :: int(sys.argv[3])]:
        bench = Bench(Run(case.settings(ranks.world), case.name, ranks))
        found = [f"{name}: {e}" for name in LAYERS for e in bench.check(name)]
        if case.model != "biased":  # its experts are not fused
            found += bench.rows_are_quantised_once(LAYERS[-1])
        for rank, one in enumerate(gather_json(found)):
            faults += [f"{case.name}: rank {rank}: {each}" for each in one]
    if ranks.is_first:
        (Path(sys.argv[1]) / "faults.json").write_text(json.dumps(faults))
        print({k: f"{v:.1e}" for k, v in WORST.items()})
    stop_ranks()
