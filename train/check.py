"""`--check`: the settings, sizes and missing inputs of an experiment, without starting a rank."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from configs.config_warnings import config_warnings
from configs.errors import ConfigError, UserError
from configs.loader import to_toml
from configs.parallel_dims import ParallelDims
from configs.paths import local_path
from configs.rules import shown
from configs.schema import JobConfig
from models.counts import flops_per_token, parameter_counts
from models.hf.table import architecture
from parallel.memory.model import CATEGORIES, MOMENTS, PARAMETERS, ROUTED
from parallel.memory.timeline import Needs
from train.checkpoint import checkpoint
from train.compute_dtype import compute_dtype
from train.data import sources
from train.data.hf_stream import PREFIX, find_stream, is_stream
from train.data.open_run_data import open_dataset
from train.data.streaming import check_stream_settings
from train.memory import predict, predict_stages
from train.report.metrics import FORCED_BALANCE
from train.tokenizer.tokenizer import check_vocab_size, find_tokenizer, load_tokenizer

_FLOPS = 4e14
"""FLOP/s of a GPU for the comparison of ZeRO stages: 40 percent of an H100's peak in bf16."""
_SAVED = (PARAMETERS, MOMENTS)
"""Categories of memory that a checkpoint has."""


def report(config: JobConfig, parallel_dims: ParallelDims, stages: bool = False) -> str:
    """The resolved experiment and its sizes as text. Raises ConfigError for invalid settings.

    stages: compare the ZeRO stages.
    """
    counts = parameter_counts(config.model)
    flops = flops_per_token(config.model, config.data.seq_len)
    tokens = config.train.global_batch * config.data.seq_len
    passes = config.train.global_batch // (config.train.micro_batch * parallel_dims.data_ranks)
    said = config_warnings(config)
    lines = [
        to_toml(config),
        *["remarks"] * bool(said),
        *(f"  {line}" for line in said),
        "mesh",
        *(f"  {axis:<13} {size:>5}   {meaning}" for axis, size, meaning in parallel_dims.table()),
        f"  {'ranks':<13} {parallel_dims.world:>5}",
        "model",
        f"  parameters    {counts.total:>15,}",
        f"  active        {counts.active:>15,}   per token; {counts.active - counts.embedding:,} "
        "without the input embedding",
        *_mtp_lines(counts.mtp),
        f"  FLOPs / token {flops:>15,.0f}   forward and backward, causal half of attention",
        f"  export as     {_export_name(config)}",
        *[f"  {FORCED_BALANCE}"] * config.model.moe.force_balance,
        "step",
        f"  tokens        {tokens:>15,}   {config.train.global_batch} sequences of "
        f"{config.data.seq_len}",
        f"  microbatches  {passes:>15,}   per rank, of {config.train.micro_batch} sequences",
        f"  whole run     {tokens * config.train.steps:>15,} tokens, "
        f"{tokens * config.train.steps * flops:.2e} FLOPs",
        "bytes per rank",
        *_bytes_per_rank(config, parallel_dims),
        *(_stages(config, parallel_dims, tokens * flops / parallel_dims.world) if stages else ()),
    ]
    return "\n".join(lines)


def _mtp_lines(mtp: int) -> list[str]:
    return [f"  MTP modules   {mtp:>15,}   in neither count; embedding and head shared"] * bool(mtp)


def missing_inputs(config: JobConfig) -> list[str]:
    """A line for each input that is not found: data, tokenizer, initial weights.

    The sizes need none of them, so they may be missing. An input that exists but is invalid raises
    ConfigError, as it would when the run starts.
    """
    data, init_from = config.data, config.checkpoint.init_from
    lines: list[str] = []

    def look(key: str, setting: str, find: Callable[[], Any]) -> None:
        try:
            find()
        except UserError as error:
            if os.path.lexists(local_path(setting)):
                raise
            line = str(error)
            lines.append(line if line.startswith(key) else f"{key}: {line}")
        except OSError as error:  # no permission, a name that is too long
            raise ConfigError(f"{key} = {shown(setting)}: {error.strerror}") from None

    for source in data.blend:
        look(
            f"data.blend {source.label}",
            source.path,
            partial(open_dataset, local_path(source.path)),
        )
    if not data.blend and is_stream(data.source):
        check_stream_settings(config)
        look("data.source", data.source.removeprefix(PREFIX), lambda: find_stream(data.source))
    elif not data.blend:
        look("data.source", data.source, lambda: lines.extend(_hub_line(sources.locate(data))))
    if data.tokenizer:
        look("data.tokenizer", data.tokenizer, lambda: _check_tokenizer(config))
    elif not data.blend:
        check_vocab_size(config.model.vocab_size)
    if init_from:
        look("checkpoint.init_from", init_from, lambda: checkpoint.find(local_path(init_from)))
    return lines


def _hub_line(source: sources.Source) -> list[str]:
    if source.identity[0] != "hub":
        return []
    return [
        f"data.source = {source.identity[1]!r}: no such file or folder; a run will ask the Hugging "
        "Face Hub for a dataset of this name"
    ]


def _check_tokenizer(config: JobConfig) -> None:
    load_tokenizer(find_tokenizer(config.data.tokenizer), config.model.vocab_size)


def _export_name(config: JobConfig) -> str:
    try:
        return architecture(config.model)
    except UserError as error:
        return f"not possible: {error}"


def _bytes_per_rank(config: JobConfig, parallel_dims: ParallelDims) -> list[str]:
    """Memory and communication of a rank, by device type, and memory under the worst routing."""
    compute = {d: compute_dtype(config, torch.device(d), is_here=False) for d in ("cpu", "cuda")}
    found = {d: predict(config, parallel_dims, d, dtype) for d, dtype in compute.items()}
    even = [needs[0].peak for needs in found.values()]
    worst = [needs[1].peak for needs in found.values()]
    host = [needs[0].host for needs in found.values()]
    exchanged = [needs[0].exchanged for needs in found.values()]
    kinds = {kind for peak in even for kind in peak if peak[kind] >= 2**10} | set(CATEGORIES[:3])
    dtypes = [str(dtype).removeprefix("torch.") for dtype in compute.values()]
    lines = [f"  {'device':<26}" + "".join(f"{d:>14}" for d in found)]
    lines += [f"  {'dtype of computation':<26}" + "".join(f"{dtype:>14}" for dtype in dtypes)]
    lines += [_row(kind, [peak[kind] for peak in even]) for kind in CATEGORIES if kind in kinds]
    lines += [_row("sum", [peak.total() for peak in even]) + "   at the worst moment of a step"]
    if any(memory.total() for memory in host):
        lines += [_row("in addition, host memory", [memory.total() for memory in host])]
    if config.checkpoint.async_save and config.checkpoint.every:
        copies = [_saved_bytes(needs[0]) for needs in found.values()]
        lines += [_row("copy of a checkpoint", copies) + "   host memory, from the first save on"]
    lines += ["  if all tokens chose the same experts, on the rank that has them:"]
    lines += [_row(f"  {kind}", [peak[kind] for peak in worst]) for kind in ROUTED]
    lines += [_row("  sum", [peak.total() for peak in worst])]
    if parallel_dims.world > 1:
        lines += ["exchanged per rank in a step (of a gather the result, of others the input)"]
        lines += [_row(kind, [n[kind] for n in exchanged]) for kind in sorted({*exchanged[0]})]
        lines += [_row("sum", [n.total() for n in exchanged])]
    return lines


def _stages(config: JobConfig, parallel_dims: ParallelDims, flops: float) -> list[str]:
    """Memory and communication of a rank in every ZeRO stage on GPUs. flops: of a rank in a
    step."""
    compute = compute_dtype(config, torch.device("cuda"), is_here=False)
    seconds = flops / _FLOPS
    used = (config.parallel.stage(experts=False), config.parallel.stage(experts=True))
    lines = [
        f"ZeRO stages on GPUs; a step's products take {seconds:.3g} s at "
        f"{_FLOPS / 1e12:.0f} TFLOP/s, during which the exchange needs a rate of",
        f"  {'zero_stage':<11} {'expert_zero_stage':<18} {'memory':>12} {'exchanged':>14}",
    ]
    for stage, needs in predict_stages(config, parallel_dims, "cuda", compute).items():
        total = needs.exchanged.total()
        lines.append(
            f"  {stage[0]:<11} {stage[1]:<18} {_size(needs.peak.total()):>12} {_size(total):>14}"
            f" {_size(total / seconds):>12}/s" + "   as set" * (stage == used)
        )
    return lines


def _saved_bytes(needs: Needs) -> int:
    """Most bytes of a rank's part of a checkpoint: of replicas, one rank saves."""
    return sum(memory[kind] for memory in (needs.peak, needs.host) for kind in _SAVED)


def _row(name: str, sizes: Sequence[float]) -> str:
    return f"  {name:<26}" + "".join(f"{_size(size):>14}" for size in sizes)


def _size(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024 or unit == "GiB":
            return f"{n_bytes:,.1f} {unit}"
        n_bytes /= 1024
    raise AssertionError
