"""Weights that FSDP2 gathers in FP8 equal the quantized master weights, on every mesh.

`[torchrun] fp8_weights_run.py FOLDER` writes `FOLDER/faults.json`, an empty list if there are none.
The reference for a weight is `quantize_128x128` of the whole master, of which each rank takes its
part under `tp`, `ep` and `etp`.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import parallel.fsdp.fp8_weights
from kernels.gemm.linear_fp8 import Fp8Weight
from kernels.quantization.quantize import quantize_128x128
from models.fp8 import Fp8Experts, Fp8FeedForward, fp8_modules
from models.layers.linear import Fp8Module, as_matrices
from parallel.fsdp.fp8_weights import GatheredWeight
from parallel.mesh import Mesh
from parallel.ranks import Ranks, gather_json, start_ranks, stop_ranks
from parallel.shards import box_of, local_of
from tests.parallel.fp8 import fp8_models
from tests.parallel.mesh.checkpoint_run import Run
from tests.parallel.mesh.mesh_run import wholes

OVER_TP = {"wq": 0, "wk": 0, "wv": 0, "wkv_b": 0, "wo": 1}
"""The dimension of a projection that the ranks of `tp` divide."""


def part_of(full: Tensor, module: nn.Module, name: str, mesh: Mesh) -> Tensor:
    """This rank's part of a whole weight before FSDP2 shards it."""

    def cut(axis: Any, dim: int) -> Tensor:
        return full.chunk(axis.size(), dim)[axis.get_local_rank()]

    if isinstance(module, Fp8Experts):
        full = cut(mesh.expert["ep"], 0)
        return cut(mesh.expert["etp"], 2)
    if isinstance(module, Fp8FeedForward):
        return cut(mesh.dense["tp"], 1)
    projection = name.split(".")[-1]
    return cut(mesh.dense["tp"], OVER_TP[projection]) if projection in OVER_TP else full


def weights_of(model: nn.Module) -> Iterator[tuple[str, Fp8Module, str]]:
    for name, module in fp8_modules(model).items():
        for key in ("weight", "w13", "w2"):
            if key in module._parameters:
                yield name, module, key


def differences(run: Run) -> list[str]:
    """The weights whose gathered form differs from that of the master in any bit."""
    expected, masters = {}, dict[str, Tensor]()
    for name, module, key in weights_of(run.model):
        master = module._parameters[key]
        assert master is not None and master.dtype == torch.float32
        masters[f"{name}.{key}"] = master
    full = wholes(masters)
    for name, module, key in weights_of(run.model):
        part = part_of(full[f"{name}.{key}"], module, name, run.mesh)
        expected[name, key] = quantize_128x128(as_matrices(key, part), module.power_of_two)[0]
    groups: list[FSDPModule] = [m for m in run.model.modules() if isinstance(m, FSDPModule)]
    for group in groups:
        group.unshard()
    found = []
    for name, module, key in weights_of(run.model):
        got, (data, scales) = module.fp8_weight(key), expected[name, key]
        if not torch.equal(got.data.view(torch.uint8), data.view(torch.uint8)):
            found.append(f"data of {name}.{key}")
        if not torch.equal(got.scales.view(torch.int32), scales.contiguous().view(torch.int32)):
            found.append(f"scales of {name}.{key}")
    for group in groups:
        group.reshard()
    return found


def poison(model: nn.Module) -> None:
    """Put a NaN and an infinity into every second weight, on the ranks that own these elements."""
    for _, module, key in list(weights_of(model))[::2]:
        parameter = module._parameters[key]
        assert parameter is not None
        box, local = box_of(parameter), local_of(parameter).detach()
        for place, value in ((-1, float("nan")), (0, float("-inf"))):
            index = [size + place if place else size // 2 for size in box.whole]
            inside = [i - o for i, o in zip(index, box.offset, strict=True)]
            if all(0 <= i < n for i, n in zip(inside, box.shape, strict=True)):
                local[tuple(inside)] = value


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts how often weights are quantized, as a shard or whole, and gathered weights used."""
    counts: Counter[str] = Counter()

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted_call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return call(*args, **kwargs)

        return counted_call

    with ExitStack() as stack:
        for name, owner, attribute in (
            ("shards", parallel.fsdp.fp8_weights, "quantize_piece"),
            ("wholes", Fp8Weight, "of"),
            ("uses", GatheredWeight, "__call__"),
        ):
            call = counting(name, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, call))
        yield counts


def check(case: fp8_models.Case, run: Run) -> list[str]:
    found = [f"first: {each}" for each in differences(run)]
    n = len(run.fp8_weights.weights)
    if n != len(list(weights_of(run.model))):
        found.append(f"{n} weights are gathered in FP8")
    train = run.config.train
    passes = train.global_batch // run.mesh.parallel_dims.data_ranks // train.micro_batch
    with counted() as counts:
        run.step(1)
    if (counts["shards"], counts["wholes"]) != (n, 0) or counts["uses"] != passes * n:
        found.append(f"{n} weights, {passes} microbatches: {dict(counts)}")
    found += [f"after a step: {each}" for each in differences(run)]
    poison(run.model)
    stale = gather_json(differences(run))
    run.fp8_weights.refresh()
    if not any(stale):
        found.append("the comparison does not see that weights have changed")
    return found + [f"poisoned: {each}" for each in differences(run)]


def both_orders_are_kept(case: fp8_models.Case, ranks: Ranks) -> list[str]:
    """As on a GPU, weights that stay gathered for a step have their columns too: the same bytes,
    after every step, and the same losses as without them."""
    settings = case.settings(ranks.world)
    settings["parallel"] = case.parallel | {"zero_stage": 2, "expert_zero_stage": 3}
    with patch("parallel.fsdp.fp8_weights.reads_columns", lambda _: True):
        run = Run(settings, case.name, ranks)
    other, found = Run(settings, case.name, ranks), []
    for step in (1, 2):
        losses = [each.step(step).loss for each in (run, other)]
        if losses[0] != losses[1]:
            found.append(f"losses of step {step} with and without columns: {losses}")
    groups: list[FSDPModule] = [m for m in run.model.modules() if isinstance(m, FSDPModule)]
    for group in groups:
        group.unshard()
    for name, module, key in weights_of(run.model):
        got = module.fp8_weight(key)
        if isinstance(module, Fp8Experts):
            if got.transposed is not got.data:
                found.append(f"{name}.{key} of ZeRO stage 3 has two orders")
            continue
        by_column = got.transposed.view(torch.uint8)
        if by_column.stride(-2) != 1 or by_column.stride(-1) % 16:
            found.append(f"columns of {name}.{key} are not contiguous: {by_column.stride()}")
        if not torch.equal(by_column, got.data.view(torch.uint8)):
            found.append(f"columns of {name}.{key}")
    for group in groups:
        group.reshard()
    if any(
        each.whole.transposed.untyped_storage().size()
        for each in run.fp8_weights.weights
        if each.whole is not None
    ):
        found.append("memory of the columns is kept between steps")
    return found


def stale_weights_are_refused(case: fp8_models.Case, ranks: Ranks) -> list[str]:
    """A step whose weights were not quantized again after the previous one, with either optimizer,
    raises an error on every rank, and after a refresh on none."""
    found = []
    for moments in ("fp32", "bf16"):
        settings = case.settings(ranks.world)
        settings["precision"]["moments"] = moments
        run = Run(settings, case.name, ranks)
        run.step(1, updated=lambda: None)
        try:
            run.step(2)
        except RuntimeError as error:
            if "changed after it was quantized" not in str(error):
                raise
        else:
            found.append(f"moments in {moments}: a step with stale weights is accepted")
    return found


if __name__ == "__main__":
    ranks = start_ranks(threads=1)
    faults = []
    for case in fp8_models.WEIGHTS[ranks.world][int(sys.argv[2]) :: int(sys.argv[3])]:
        found = check(case, Run(case.settings(ranks.world), case.name, ranks))
        first, second = fp8_models.WEIGHTS[ranks.world][:2]
        if case == first:
            found += stale_weights_are_refused(case, ranks)
        if case == second:
            found += both_orders_are_kept(case, ranks)
        for rank, one in enumerate(gather_json(found)):
            faults += [f"{case.name}: rank {rank}: {each}" for each in one]
    if ranks.is_first:
        (Path(sys.argv[1]) / "faults.json").write_text(json.dumps(faults))
    stop_ranks()
