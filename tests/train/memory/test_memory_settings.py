"""Every setting that changes memory or traffic is traced, alone and together with every other, and
changes the prediction in the right direction."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import cache
from itertools import combinations, pairwise, product
from typing import Any

import pytest
import torch

from configs.loader import from_dict
from configs.model import AttentionConfig, ModelConfig
from configs.parallel_dims import ParallelDims, resolve
from configs.schema import JobConfig
from models.counts import parameter_counts
from parallel.memory.timeline import Needs
from tests.models.families import FAMILIES
from train.compute_dtype import compute_dtype
from train.memory import predict, predict_even

RANKS = 4
MLA = AttentionConfig(
    kind="mla", n_heads=8, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=32,
    qk_rope_head_dim=32, v_head_dim=32,
)  # fmt: skip


def wide(family: str, **more: Any) -> ModelConfig:
    """A family's model whose parts are full FP8 blocks on every mesh."""
    model = FAMILIES[family]
    attention = replace(MLA, bias=False) if model.attention.kind == "mla" else model.attention
    if attention.kind == "gqa":
        attention = replace(attention, n_heads=8, n_kv_heads=8, head_dim=32)
    moe = replace(model.moe, n_experts=8, d_expert=256)
    sizes = {"d_model": 256, "vocab_size": 1024, "d_ff": model.d_ff and 512}
    return replace(model, attention=attention, moe=moe, **sizes | more)


def experiment(
    model: ModelConfig | None = None, passes: int = 1, micro_batch: int = 4, seq_len: int = 128,
    precision: Mapping[str, Any] | None = None, **parallel: Any,
) -> JobConfig:  # fmt: skip
    ranks = RANKS // parallel.get("tp", 1)
    settings = {
        "run": {"dir": "unused"},
        "data": {"seq_len": seq_len},
        "model": asdict(model or wide("qwen3", n_layers=12)),
        "train": {
            "steps": 2, "global_batch": passes * micro_batch * ranks, "micro_batch": micro_batch,
        },
        "optimizer": {"lr": 1e-3},
        "parallel": parallel,
        "precision": precision or {},
    }  # fmt: skip
    return from_dict(settings, "experiment")


@cache
def needs(config: JobConfig, device: str) -> tuple[Needs, Needs]:
    return predict(
        config,
        resolve(config, RANKS),
        device,
        compute_dtype(config, torch.device(device), is_here=False),
    )


@cache
def evenly(config: JobConfig, device: str) -> Needs:
    """The first result of `needs`, alone."""
    compute = compute_dtype(config, torch.device(device), is_here=False)
    return predict_even(config, resolve(config, RANKS), device, compute)


SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "model": {
        "mtp": {"model": wide("deepseek-v3-mtp", mtp_depth=1)},
        "windows": {"model": wide("gpt-oss")},
        "gqa": {"model": wide("qwen3")},
        "mla": {"model": wide("deepseek-v3")},
        "chunks": {"model": wide("llama4")},
    },
    "mesh": {
        "dp": {"dp_shard": 4},
        "ep": {"dp_shard": 4, "ep": 4},
        "tp": {"dp_shard": 2, "tp": 2, "ep": 4},
        "etp": {"dp_shard": 2, "tp": 2, "ep": 2, "etp": 2},
        "replicas": {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
    },
    "dispatch": {
        "all_to_all": {},
        "sync_free": {"dispatch": {"kind": "sync_free"}},
        "hierarchical": {"dispatch": {"kind": "hierarchical", "combine_dtype": "fp8"}},
        "deepep": {"dispatch": {"kind": "deepep"}},
        "in chunks": {"dispatch": {"chunks": 2, "dispatch_dtype": "fp8"}},
    },
    "recompute": {
        "none": {},
        "swiglu": {"recompute_swiglu": True},
        "selective": {"recompute": "selective"},
        "keeps": {"recompute": "selective", "recompute_keep": ["exchange"], "recompute_every": 2},
        "full": {"recompute": "full"},
    },
    "precision": {
        "bf16": {"precision": {"recipe": "bf16", "moments": "bf16"}},
        "fp32": {"precision": {"recipe": "fp32"}},
        "fp8": {"precision": {"recipe": "fp8_blockwise", "fp8": {"power_of_two": True}}},
        "partly fp8": {"precision": {
            "recipe": "fp8_blockwise", "moments": "bf16",
            "fp8": {"first_bf16": 1, "keep": ["*.wo", "layers.2.*"]},
        }},
    },
    "fsdp": {
        "usual": {},
        "gathered": {"reshard_after_forward": False, "prefetch": 2},
        "offload": {"cpu_offload": True, "prefetch": 0},
        "compile": {"compile": True},
        "zero 1": {"zero_stage": 1, "passes": 3},
        "zero 2 and 1": {"zero_stage": 2, "expert_zero_stage": 1},
    },
    "passes": {"one": {}, "two": {"passes": 2}},
    "device": {"cuda": {}, "cpu": {}},
}  # fmt: skip
Combination = dict[str, str]
"""A value for each of `SETTINGS`, or for some."""
REFUSED = [
    {"precision": "fp8", "fsdp": "offload"}, {"precision": "partly fp8", "fsdp": "offload"},
    {"model": "windows", "recompute": "swiglu"},
]  # fmt: skip
WITHOUT_EFFECT = [{"mesh": "dp", "dispatch": kind} for kind in SETTINGS["dispatch"]][1:]


def may_meet(chosen: Combination) -> bool:
    return not any(pair.items() <= chosen.items() for pair in REFUSED + WITHOUT_EFFECT)


def parts(size: int) -> list[Combination]:
    """All values, or all valid pairs of them."""
    return [
        dict(zip(kinds, values, strict=True))
        for kinds in combinations(SETTINGS, size)
        for values in product(*(SETTINGS[kind] for kind in kinds))
        if may_meet(dict(zip(kinds, values, strict=True)))
    ]


def cover(missing: list[Combination]) -> Iterator[Combination]:
    """Few combinations that have all of these parts."""

    def met(chosen: Combination) -> int:
        return sum(part.items() <= chosen.items() for part in missing)

    used = Counter[tuple[str, str]]()
    while missing:
        chosen = missing[0]
        for kind in [kind for kind in SETTINGS if kind not in chosen]:
            # the order of `SETTINGS` decides: costly values are in different combinations
            values = sorted(SETTINGS[kind], key=lambda value: used[kind, value])
            grown = [chosen | {kind: value} for value in values]
            chosen = max(filter(may_meet, grown), key=met)
        used.update(chosen.items())
        missing = [part for part in missing if not part.items() <= chosen.items()]
        yield {kind: chosen[kind] for kind in SETTINGS}


def config_of(chosen: Combination) -> JobConfig:
    merged: dict[str, Any] = {}
    for kind, name in chosen.items():
        merged |= SETTINGS[kind][name]
    return experiment(**merged)


def marked() -> Iterator[Any]:
    """Combinations that have every pair of values; all but a few that have every value are slow."""
    few = list(cover(parts(1)))
    pairs = [p for p in parts(2) if not any(p.items() <= chosen.items() for chosen in few)]
    for chosen in [*few, *cover(pairs)]:
        marks = [] if chosen in few else [pytest.mark.slow]
        yield pytest.param(chosen, marks=marks, id=" ".join(chosen.values()))


@pytest.mark.parametrize("chosen", [*marked()])
def test_every_pair_of_settings_is_traced(chosen: Combination) -> None:
    config, device = config_of(chosen), chosen["device"]
    parallel_dims = resolve(config, RANKS)
    even, worst = needs(config, device)
    home = even.host if config.parallel.cpu_offload and device == "cuda" else even.peak
    assert home["parameters"] == pytest.approx(4 * own_parameters(config, parallel_dims), rel=2e-3)
    moment = 2 if config.precision.moments == "bf16" else 4
    assert home["AdamW moments"] >= 2 * moment * own_parameters(config, parallel_dims) * (1 - 2e-3)
    assert bool(even.host) == (home is even.host)
    axes = {exchange.rsplit(" ", 1)[0] for exchange in even.exchanged}
    assert axes == axes_of(config, parallel_dims)
    assert worst.peak.total() > 0.97 * even.peak.total()


def own_parameters(config: JobConfig, parallel_dims: ParallelDims) -> float:
    """Bytes of one rank, without padding."""
    counts = parameter_counts(config.model)
    dense = (counts.total + counts.mtp - counts.experts) / (
        parallel_dims.dp_shard * parallel_dims.tp
    )
    return dense + counts.experts / (parallel_dims.efsdp * parallel_dims.ep * parallel_dims.etp)


def axes_of(config: JobConfig, parallel_dims: ParallelDims) -> set[str]:
    """The axes along which something is exchanged."""
    d = parallel_dims
    sizes = {"dp_replicate": d.dp_replicate, "dp_shard": d.dp_shard, "tp": d.tp, "etp": d.etp}
    if d.tp > 1:
        sizes["dp_shard_tp"] = d.dp_shard * d.tp
    stages = {config.parallel.stage(experts) for experts in (False, True)}
    if d.tp * d.ep > 1 or len(stages) > 1:
        sizes["efsdp"] = d.efsdp
    if config.parallel.dispatch.kind == "hierarchical":
        sizes |= {"ep between nodes": 2, "ep in a node": d.ep // 2}
    sizes["ep"] = d.ep  # counts of rows
    return {axis for axis, size in sizes.items() if size > 1}


SELECTIVE: dict[str, Any] = {"recompute": "selective"}
EP: dict[str, Any] = {"ep": 4}
FEW_TOKENS: dict[str, Any] = {"micro_batch": 1, "seq_len": 32, "recompute": "full"}
BF16, FP8 = {"recipe": "bf16"}, {"recipe": "fp8_blockwise"}
FEWER_FIRST: dict[str, list[dict[str, Any]]] = {
    "recompute": [
        EP | settings
        for settings in (
            {"recompute": "full"},
            SELECTIVE | {"recompute_keep": ["attention"]},
            SELECTIVE,
            SELECTIVE | {"recompute_keep": ["attention", "matmul", "exchange"]},
            {},
        )
    ],
    "every second": [
        EP | more
        for more in (
            {"recompute": "full"},
            {"recompute": "full", "recompute_every": 2},
            {},
        )
    ],
    "recompute_swiglu": [{"recompute_swiglu": True}, {}],
    "FP8": [{"precision": FP8}, {"precision": BF16}],
    "some in bf16": [{"precision": FP8}, {"precision": FP8 | {"fp8": {"last_bf16": 6}}}],
    "offload": [{"cpu_offload": True}, {}],
    "moments": [{"precision": BF16 | {"moments": "bf16"}}, {"precision": BF16}],
    "accumulation": [{}, {"passes": 2}],
    "replicas": [{}, {"dp_replicate": 2}, {"dp_replicate": 4}],
    "tp": [{"tp": 4}, {"tp": 2}, {}],
    "prefetch": [FEW_TOKENS | {"prefetch": ahead} for ahead in (1, 3)],
    "gathered": [{}, {"reshard_after_forward": False}],
    "stages": [
        {"passes": 4, "zero_stage": dense, "expert_zero_stage": experts}
        for dense, experts in ((3, 3), (2, 3), (2, 2), (2, 1), (1, 1))
    ],
    "room": [
        EP | {"dispatch": {"kind": "sync_free", "capacity_factor": factor}} for factor in (1, 2)
    ],
    "MTP": [{"model": wide("deepseek-v3", mtp_depth=depth)} for depth in (0, 1, 2)],
    "layers": [{"model": wide("qwen3", n_layers=n)} for n in (11, 12, 100)],
    "words": [{"model": wide("qwen3", n_layers=12, vocab_size=2**n)} for n in (10, 15)],
    "tokens": [{"micro_batch": 1}, {}, {"seq_len": 256}],
}
"""Settings by increasing memory of a rank on CUDA."""


@pytest.mark.parametrize("name", FEWER_FIRST)
def test_memory_rises(name: str) -> None:
    found = [evenly(experiment(**settings), "cuda").peak.total() for settings in FEWER_FIRST[name]]
    assert all(fewer < more for fewer, more in pairwise(found)), found


@pytest.mark.parametrize("stage", [2, 1])
def test_traffic_of_microbatches(stage: int) -> None:
    """Weights are gathered, and gradients reduced, as often as the stage says; dispatch does not
    depend on it."""

    def exchanged(passes: int) -> dict[str, int]:
        config = experiment(passes=passes, zero_stage=stage, dp_replicate=2, dp_shard=2, ep=2)
        return evenly(config, "cuda").exchanged

    one = exchanged(1)
    for passes in (2, 5):
        found = exchanged(passes)
        once = {"dp_shard all-gather": stage < 3, "dp_shard reduce-scatter": stage < 2,
                "dp_replicate all-reduce": stage < 2, "ep all-to-all": False}  # fmt: skip
        assert found.keys() == once.keys() == one.keys()
        assert found == {
            kind: one[kind] * (1 if is_once else passes) for kind, is_once in once.items()
        }


PARTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "heads of tp": ("attention", {"tp": 2}, {}),
    "experts of ep": ("gathered weights", {"ep": 4}, {}),
    "experts of etp": (
        "gathered weights", {"tp": 2, "ep": 2, "etp": 2}, {"tp": 2, "ep": 2},
    ),
    "queries of MLA": (
        "attention", {"model": wide("deepseek-v3")},
        {"model": replace(wide("deepseek-v3"), attention=replace(MLA, q_lora_rank=512))},
    ),
}  # fmt: skip
"""Pairs of settings of which the first has less memory of a category."""


@pytest.mark.parametrize("name", PARTS)
def test_a_category_rises(name: str) -> None:
    category, *both = PARTS[name]
    fewer, more = (evenly(experiment(**settings), "cuda").peak[category] for settings in both)
    assert fewer < more


@pytest.mark.parametrize("family", ["qwen3", "gpt-oss", "llama4"])
def test_cuda_has_no_masks(family: str) -> None:
    """Of documents, windows and chunks, and no scores of sinks."""
    found = evenly(experiment(wide(family)), "cuda").peak
    assert not found["attention masks"]


EXCHANGED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kept exchanges": (
        EP | SELECTIVE | {"recompute_keep": ["exchange"]}, EP | {"recompute": "full"},
    ),
    "FP8 on the wire": (EP | {"dispatch": {"dispatch_dtype": "fp8"}}, EP),
    "weights in FP8": ({"precision": FP8}, {"precision": BF16}),
    "kept weights": ({"reshard_after_forward": False}, {}),
    "microbatches": ({}, {"passes": 2}),
}  # fmt: skip
"""Pairs of settings of which the first exchanges less."""


@pytest.mark.parametrize("name", EXCHANGED)
def test_traffic_rises(name: str) -> None:
    fewer, more = (
        evenly(experiment(**settings), "cuda").exchanged.total() for settings in EXCHANGED[name]
    )
    assert fewer < more


def test_what_is_not_traced_is_predicted_as_without() -> None:
    plain = evenly(experiment(ep=4), "cuda")
    assert needs(experiment(ep=4), "cuda")[0] == plain
    assert evenly(experiment(ep=4, compile=True), "cuda") == plain
    assert evenly(experiment(ep=4, dispatch={"kind": "deepep"}), "cuda") == plain


def test_with_limited_room_no_routing_is_worse() -> None:
    stops = {"kind": "sync_free", "on_overflow": "stop"}
    even, worst = needs(experiment(ep=4, dispatch=stops), "cuda")
    assert even == worst
    even, worst = needs(experiment(ep=4, dispatch={"kind": "sync_free"}), "cuda")
    assert worst == needs(experiment(ep=4), "cuda")[1]
    assert worst.peak.total() > even.peak.total()


def test_ten_thousand_layers_take_seconds() -> None:
    start = time.process_time()
    sizes = [
        evenly(experiment(wide("qwen3", n_layers=n), recompute="full"), "cuda").peak
        for n in (100, 5050, 10_000)
    ]
    assert time.process_time() - start < 10
    for kind in {kind for peak in sizes for kind in peak}:
        small, middle, large = (peak[kind] for peak in sizes)
        assert middle - small == large - middle, kind
