"""Traced tensors are counted like real ones, and few layers predict the memory of all."""

import gc
import sys
from collections import Counter
from dataclasses import asdict, replace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.errors import UserError
from configs.loader import from_dict
from configs.parallel_dims import resolve
from configs.precision import FP8Config
from configs.schema import JobConfig
from kernels.moe.permute import permutation
from models.block import Block
from models.documents import DocumentAttention
from models.init import initialize
from models.layers.rope import rope_tables
from parallel.memory import layers as layers_of
from parallel.memory.fake_group import fake_group
from parallel.memory.layers import fewest, reduced
from parallel.memory.timeline import Needs, extrapolate, needs_of
from parallel.memory.tracker import MemoryTracker, Segment, Traced
from tests.models.families import FAMILIES
from train.memory import predict, predict_even

SEQUENCES, LENGTH = 2, 40


def held(tracker: MemoryTracker) -> int:
    return sum(event.n_bytes for segment in tracker.segments for event in segment.events)


def storage_key(tensor: Tensor) -> int:
    inner = tensor.content if isinstance(tensor, Traced) else tensor
    return int(inner.untyped_storage()._cdata)


def saved_bytes(run: Any, skip: set[int]) -> int:
    """Bytes of the storages that autograd saves in `run`, except those in `skip`."""
    sizes: dict[int, int] = {}

    def see(tensor: Tensor) -> Tensor:
        inner = tensor.content if isinstance(tensor, Traced) else tensor
        if storage_key(tensor) not in skip:
            sizes[storage_key(tensor)] = inner.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        kept = run()
    del kept
    return sum(sizes.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_autograd_saves_as_much_of_traced_tensors(family: str, dtype: torch.dtype) -> None:
    config = FAMILIES[family]
    config = replace(config, moe=replace(config.moe, force_balance=True))
    rng = torch.Generator().manual_seed(3)
    positions_BL = torch.arange(LENGTH).repeat(SEQUENCES, 1) % 25  # two documents each
    for index in range(config.n_layers):
        block = Block(config, index)
        initialize(block, config, 0)
        block = block.to(dtype)
        core = DocumentAttention(positions_BL)
        x_TD = torch.randn(SEQUENCES * LENGTH, config.d_model, generator=rng).to(dtype)
        tables = rope_tables(positions_BL.view(-1), config.rope, config.attention.rope_dim)
        skip = {storage_key(t) for t in [x_TD, *block.parameters()]}
        arguments = (x_TD.requires_grad_(), positions_BL.view(-1), tables, core)
        real = saved_bytes(lambda a=arguments, b=block: b(*a), skip)
        assert saved_when_traced(block, x_TD, positions_BL) == real, f"layer {index}"


def saved_when_traced(block: Block, x_TD: Tensor, positions_BL: Tensor) -> int:
    """The same for traced tensors like these."""
    with MemoryTracker("cpu"):
        for module in block.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty_like(parameter.detach()))
        x_TD = torch.empty_like(x_TD.detach()).requires_grad_()
        positions_BL = positions_BL.clone()
        config = block.attention.config
        shape = (positions_BL.numel(), config.rope_dim // 2)
        tables = tuple(torch.empty(shape) for _ in range(2))
        core = DocumentAttention(positions_BL)
        skip = {storage_key(t) for t in [x_TD, *block.parameters()]}
        return saved_bytes(lambda: block(x_TD, positions_BL.view(-1), tables, core), skip)


def test_a_storage_is_counted_once_and_until_the_last_view_goes() -> None:
    with MemoryTracker("cpu") as tracker:
        x = torch.empty(10, 10)
        view = x.view(100)[10:20]
        assert held(tracker) == 400
        y = view.exp()
        assert held(tracker) == 440
        del x
        assert held(tracker) == 440
        del view
        assert held(tracker) == 40
        y.mul_(2)
        assert held(tracker) == 40
        y.untyped_storage().resize_(0)
        assert held(tracker) == 0
        y.untyped_storage().resize_(40)
        del y
    assert held(tracker) == 0


def test_integers_have_data_and_host_reads_see_it() -> None:
    ids_TK = torch.tensor([[0, 2], [2, 1], [2, 0]])
    real = permutation(ids_TK, 3, align=4)
    with MemoryTracker("cuda"):
        traced = permutation(ids_TK.clone(), 3, align=4)
        assert traced.ends_E.device.type == "meta"
        assert traced.ends_E.tolist() == real.ends_E.tolist() == [4, 8, 12]
        assert traced.order_P.tolist() == real.order_P.tolist()
        assert int(traced.counts_E.max()) == 3
        rows = torch.ones(6, 5).index_select(0, traced.inverse_R - traced.inverse_R)
        assert rows.shape == (6, 5)
        assert float(rows.sum()) == 0 and bool(torch.isfinite(rows).all())  # without data


def test_a_traced_tensor_outside_its_mode_is_an_error() -> None:
    with MemoryTracker("cpu"):
        x = torch.ones(3)
    with pytest.raises(RuntimeError, match="outside its mode"):
        x + 1


def test_a_trace_at_two_sizes_tells_that_of_a_third() -> None:
    def run(size: int) -> list[Segment]:
        with MemoryTracker("cpu") as tracker:
            tracker.begin("first")
            kept = torch.empty(size, 8).exp()
            tracker.mark("then")
            del kept
            torch.empty(5).add(1)
            return tracker.begin("")

    found, wanted = extrapolate(run(10), run(20), 3.0), run(40)
    assert [(s.mark, s.events) for s in found] == [(s.mark, s.events) for s in wanted]


@pytest.mark.parametrize("radius", [1, 2, 3])
@pytest.mark.parametrize("kinds", ["DDD" + "M" * 58 + "P", "AB" * 12, "LLLF" * 12, "ABCDEF", "A"])
def test_few_layers_have_the_surroundings_of_all(kinds: str, radius: int) -> None:
    layers = fewest(kinds, radius, len(kinds))

    def around(sequence: str, index: int) -> str:
        padded = "." * radius + sequence + "." * radius
        return padded[index : index + 2 * radius + 1]

    kept = "".join(kinds[i] for i in layers.kept)
    assert layers.kept == sorted(layers.kept) and layers.times.total() == len(kinds)
    for index, place in enumerate(layers.place):
        assert around(kept, place) == around(kinds, index)
    assert len(layers.kept) <= 2 * len({around(kinds, i) for i in range(len(kinds))})


def experiment(n_layers: int, family: str, parallel: dict[str, Any], **more: Any) -> JobConfig:
    model = replace(FAMILIES[family], n_layers=n_layers)
    settings = {
        "run": {"dir": "unused"},
        "data": {"seq_len": 64},
        "model": asdict(replace(model, **more.pop("model", {}))),
        "train": {"steps": 2, "global_batch": 32, "micro_batch": 2},
        "optimizer": {"lr": 1e-3},
        "parallel": parallel,
    }
    return from_dict(settings | more, "experiment")


EXPERIMENTS = [
    experiment(6, "gpt-oss", {"ep": 2, "recompute": "full", "recompute_every": 2}),
    experiment(
        8, "llama4", {"dp_shard": 2, "tp": 2, "ep": 4, "prefetch": 2},
        model={"attention": replace(FAMILIES["llama4"].attention, full_every=2)},
    ),
    experiment(9, "deepseek-v3", {"ep": 4, "reshard_after_forward": False}, model={"mtp_depth": 2}),
    experiment(5, "mixtral", {"dp_replicate": 2, "dp_shard": 2, "prefetch": 0}),
    experiment(
        10, "glm4", {"dp_shard": 4},
        precision={
            "recipe": "fp8_blockwise", "fp8": {"first_bf16": 1, "keep": ["layers.5.*", "*.wo"]}
        },
    ),
    experiment(
        5, "mixtral", {"dp_shard": 4, "zero_stage": 1, "expert_zero_stage": 2},
        precision={"recipe": "fp8_blockwise"},
    ),
]  # fmt: skip


DEVICES = ("cpu", "cuda", "cpu", "cuda", "cuda", "cuda")


def needs(number: int, loads: Literal["even", "even and worst"]) -> tuple[Needs, ...]:
    """What an experiment needs for even loads, and for the worst case."""
    config = EXPERIMENTS[number]
    arguments = (config, resolve(config, 4), DEVICES[number], torch.bfloat16)
    return (predict_even(*arguments),) if loads == "even" else predict(*arguments)


@pytest.mark.parametrize(
    ("number", "loads"),
    [
        # the worst case differs from even loads most with four ranks of `ep`, as in 1
        (0, "even"), (1, "even and worst"), (3, "even"), (5, "even"),
        *(pytest.param(i, "even and worst", marks=pytest.mark.slow) for i in (0, 2, 3, 4, 5)),
    ],
)  # fmt: skip
def test_few_layers_tell_what_all_need(
    number: int, loads: Literal["even", "even and worst"], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EXPERIMENTS[number]
    few = needs(number, loads)
    n_few = len(reduced(config)[1].kept)
    monkeypatch.setattr(
        layers_of, "fewest",
        lambda kinds, _, n: layers_of.Layers([*range(len(kinds))], [*range(len(kinds))], n),
    )  # fmt: skip
    assert n_few < len(reduced(config)[1].kept)
    for one, other in zip(few, needs(number, loads), strict=True):
        assert one.exchanged == other.exchanged
        # with FP8, 80 bytes per layer of an earlier microbatch are freed where its layer begins
        tolerance = 1e-4 if config.parallel.zero_stage == 3 else 3e-4
        assert one.peak.total() == pytest.approx(other.peak.total(), rel=tolerance)


def test_a_pattern_that_matches_nothing_is_refused_of_all_layers() -> None:
    config = EXPERIMENTS[4]
    fp8 = FP8Config(keep=("layers.9.attention.wo", "layers.10.*"))
    config = replace(config, precision=replace(config.precision, fp8=fp8))
    with pytest.raises(UserError, match=r"no module is called 'layers\.10"):
        reduced(config)


def test_a_fake_group_leaves_nothing_behind() -> None:
    hook = sys.excepthook
    with fake_group(1024):
        assert dist.get_world_size() == 1024
        dist.new_group(list(range(512)))
    assert not dist.is_initialized() and sys.excepthook is hook
    with pytest.raises(RuntimeError, match="an error"), fake_group(2):
        assert dist.get_world_size() == 2
        raise RuntimeError("an error")
    assert not dist.is_initialized()


def test_beside_a_running_group_there_is_none() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="twice"), fake_group(2):
            pass
        assert dist.get_world_size() == 1
    finally:
        dist.destroy_process_group()


def test_what_outlives_its_layer_counts_as_often_as_that() -> None:
    layers = fewest("AAAAAA", 1, 6)  # three of six are traced
    assert layers.times == Counter({0: 1, 1: 4, 2: 1})
    with MemoryTracker("cpu") as tracker:
        tracker.begin("step")
        kept = []
        for index in range(3):
            tracker.mark("forward", index)
            kept.append(torch.empty(index + 1))
        tracker.mark("end")
        del kept
        end = torch.empty(100)
        segments = tracker.begin("")
        del end
    gc.collect()
    found = needs_of(Counter(), segments, layers, 1)
    assert found.peak.total() == 400  # all six, 4 + 4 * 8 + 12 bytes, are freed before
