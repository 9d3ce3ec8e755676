"""A training step of Qwen3-30B-A3B's layers, in bf16 and in FP8: tokens/s, memory, host waits.

The number of layers is the largest that fits with fp32 masters, gradients and both moments. The
whole of `train_step` is timed, on random tokens, with the initial router (unbalanced, as at the
start of training). It also compares the loss and the gradients of a small model in FP8 on the
device with the emulation on the CPU, from the same weights and tokens: they differ by the order of
sums, and by the FP8 codes that this changes.
"""

import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from configs.loader import from_dict
from configs.schema import JobConfig
from parallel.apply import materialize
from parallel.fsdp.fp8_weights import gather_in_fp8
from parallel.ranks import Ranks, start_ranks, stop_ranks
from scripts.gpu_suite.harness import FAKE_MS, Check, Place, Timing
from train.build import shard_model
from train.data.batches import Batch, shuffled_epochs
from train.dataset.sequences import sequences_of
from train.step import train_step

LAYERS, SEQ_LEN, SEQUENCES = 9, 4096, 8
RECIPES = {"fp8_blockwise": "ours", "bf16": "bf16"}


@dataclass(frozen=True)
class StepTiming(Timing):
    """Time of a step and other costs."""

    tokens: int = 0
    peak_gib: tuple[float, ...] = ()
    host_copies: tuple[int, ...] = ()

    def rate(self, name: str) -> str:
        """Tokens per second."""
        return f"{self.tokens / self.milliseconds[name] * 1e3:,.0f} tokens/s"

    def lines(self) -> Iterator[str]:
        """Adds a row with memory and copies to the host of each."""
        yield from super().lines()
        costs = zip(self.milliseconds, self.peak_gib, self.host_copies, strict=True)
        for name, peak, copies in costs:
            yield (
                f"| {self.case} | {name}: peak {peak:.1f} GiB, {copies} copies to the host in a "
                "step | | | |"
            )


class Training:
    """A model on one device, and steps of it; with torch's own optimizer (torchtitan may be
    missing)."""

    def __init__(self, settings: dict[str, Any], ranks: Ranks) -> None:
        config: JobConfig = from_dict(settings, "gpu_suite")
        device = ranks.device
        compute = torch.float32 if config.precision.recipe == "fp32" else torch.bfloat16
        self.model = shard_model(config, ranks, compute).model
        materialize(self.model, config.model, config.run.seed, device)
        self.weights = gather_in_fp8(self.model, config.parallel)
        self.weights.refresh()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-5, fused=device.type == "cuda"
        )
        tokens = np.random.default_rng(0).integers(1, config.model.vocab_size, 100_000)
        tokens[::997] = 0
        sequences = sequences_of(tokens.astype(np.uint32), config.data.seq_len, eot=0)
        self.data = shuffled_epochs(
            sequences, seed=0, global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch, rank=0, n_ranks=1,
        )  # fmt: skip
        self.device, self.count = device, 0

    def batches(self) -> list[Batch]:
        """The batches of the next step."""
        self.count += 1
        return [batch.to(self.device) for batch in self.data.step(self.count)]

    def step(self, batches: list[Batch]) -> float:
        """Run a step and return the loss."""
        done = train_step(
            self.model, self.optimizer, batches, step=self.count, rank=0, clip_norm=1.0,
            mtp_weight=0.0, z_loss_coef=0.0, updated=self.weights.refresh,
        )  # fmt: skip
        assert done is not None
        return done.loss


def settings(
    recipe: str, n_layers: int, seq_len: int, sequences: int, width: int
) -> dict[str, Any]:
    """Qwen3-30B-A3B's layers, or with another width a small version of them."""
    full = width == 2048
    moe = {"n_experts": 128 if full else 8, "top_k": 8 if full else 2}
    heads = {"n_heads": 32, "n_kv_heads": 4} if full else {"n_heads": 2, "n_kv_heads": 1}
    return {
        "run": {"dir": "unused"},
        "data": {"seq_len": seq_len},
        "model": {
            "vocab_size": 151936 if full else 512, "d_model": width, "n_layers": n_layers,
            "attention": {"head_dim": 128, "qk_norm": "rms"} | heads,
            "moe": moe | {"d_expert": 768 if full else 256},
        },
        "train": {"steps": 1, "global_batch": sequences, "micro_batch": max(sequences // 2, 1)},
        "optimizer": {"lr": 1e-5},
        "precision": {"recipe": recipe},
    }  # fmt: skip


def check(place: Place) -> Iterator[Check]:
    """Compare FP8 on the device with the emulation: the loss, and every gradient."""
    small = settings("fp8_blockwise", *((1, 64, 2, 256) if place.dry_run else (2, 128, 4, 256)))
    with _one_rank() as ranks:
        devices = place.device, torch.device("cpu")
        results = [_gradients(small, replace(ranks, device=device)) for device in devices]
    (loss, ours), (expected, theirs) = results
    yield Check("loss in FP8, device and CPU", abs(loss - expected) / expected, 1e-3)
    worst = max(
        float((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-12))
        for name in theirs
    )
    yield Check("gradients in FP8, device and CPU, worst parameter", worst, 0.1)


def _gradients(small: dict[str, Any], ranks: Ranks) -> tuple[float, dict[str, Tensor]]:
    training = Training(small, ranks)
    kept: dict[str, Tensor] = {}

    class Keep:
        """An optimizer that only records gradients."""

        def step(self) -> None:
            for name, parameter in training.model.named_parameters():
                gradient: Any = parameter.grad
                kept[name] = gradient.full_tensor().detach().double().cpu()

        def zero_grad(self) -> None:
            for parameter in training.model.parameters():
                parameter.grad = None

    training.optimizer = Keep()  # type: ignore[assignment]
    return training.step(training.batches()), kept


def measure(place: Place) -> Iterator[Timing]:
    """Time the step in both recipes, one model after the other, since two do not fit. To compile,
    one step of one layer."""
    shape = (1, 64, 2, 256) if place.dry_run else (LAYERS, SEQ_LEN, SEQUENCES, 2048)
    if place.compiles_only and not place.dry_run:
        shape = (1, SEQ_LEN, 2, 2048)
    n_layers, seq_len, sequences, _ = shape
    milliseconds, peaks, copies = {}, [], []
    for recipe, name in RECIPES.items():
        with _one_rank() as ranks:
            training = Training(settings(recipe, *shape), replace(ranks, device=place.device))
            if place.compiles_only:
                training.step(training.batches())
                continue
            milliseconds[name] = _time(training, place)
            peaks.append(_peak(training, place))
            copies.append(_host_copies(training, place))
            del training
        gc.collect()
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
    if place.compiles_only:
        return
    case = f"{n_layers} layers of Qwen3-30B-A3B, {sequences} x {seq_len} tokens"
    yield StepTiming(
        case, milliseconds, tokens=sequences * seq_len, peak_gib=tuple(peaks),
        host_copies=tuple(copies),
    )  # fmt: skip


def _time(training: Training, place: Place) -> float:
    if place.dry_run:
        training.step(training.batches())
        return FAKE_MS
    seconds = []
    for i in range(3 + place.rounds // 2):
        batches = training.batches()
        _wait(place)
        start = time.perf_counter()
        training.step(batches)
        _wait(place)
        if i >= 3:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e3


def _peak(training: Training, place: Place) -> float:
    if place.device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats(place.device)
    training.step(training.batches())
    return torch.cuda.max_memory_allocated(place.device) / 2**30


def _host_copies(training: Training, place: Place) -> int:
    if place.device.type != "cuda":
        return 0
    batches = training.batches()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        training.step(batches)
        _wait(place)
    return sum(
        event.device_type == DeviceType.CUDA and "DtoH" in event.name for event in trace.events()
    )


def _wait(place: Place) -> None:
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)


@contextmanager
def _one_rank() -> Iterator[Ranks]:
    """A process group of this process alone, destroyed afterwards: others create their own."""
    ranks = start_ranks()
    try:
        yield ranks
    finally:
        stop_ranks()
