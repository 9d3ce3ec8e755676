"""`--check`: what an experiment is and needs, without starting a rank."""

from pathlib import Path

from configs.degrees import Degrees
from configs.loader import to_toml
from configs.rules import ConfigError
from configs.schema import RunConfig
from models.counts import flops_per_token, parameter_counts
from models.hf.table import architecture
from parallel.dispatch.memory import row_memory
from train import checkpoint, sources
from train.metrics import FORCED_BALANCE
from train.tokenizer import check_vocab_size, find_tokenizer, load_tokenizer

_STATE_BYTES = {"parameters": 4, "gradients": 4, "AdamW moments": 8}
"""Bytes per parameter of a shard: everything that is kept is fp32."""


def report(config: RunConfig, degrees: Degrees) -> str:
    """The resolved experiment and its sizes as text; ConfigError where something cannot work."""
    counts = parameter_counts(config.model)
    flops = flops_per_token(config.model, config.data.seq_len)
    tokens = config.train.global_batch * config.data.seq_len
    passes = config.train.global_batch // (config.train.micro_batch * degrees.data_ranks)
    lines = [
        to_toml(config),
        "mesh",
        *(f"  {axis:<13} {size:>5}   {meaning}" for axis, size, meaning in degrees.table()),
        f"  {'ranks':<13} {degrees.world:>5}",
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
        *_bytes_per_rank(config, degrees),
    ]
    return "\n".join(lines)


def _mtp_lines(mtp: int) -> list[str]:
    return [f"  MTP modules   {mtp:>15,}   in neither count; embedding and head shared"] * bool(mtp)


def find_inputs(config: RunConfig) -> None:
    """Raise ConfigError where data, tokenizer or initial weights are not there."""
    sources.locate(config.data)
    if config.data.tokenizer:
        load_tokenizer(find_tokenizer(config.data.tokenizer), config.model.vocab_size)
    else:
        check_vocab_size(config.model.vocab_size)
    if config.checkpoint.init_from:
        checkpoint.find(Path(config.checkpoint.init_from).expanduser())


def _export_name(config: RunConfig) -> str:
    try:
        return architecture(config.model)
    except ConfigError as error:
        return f"not possible: {error}"


def _bytes_per_rank(config: RunConfig, degrees: Degrees) -> list[str]:
    counts = parameter_counts(config.model)
    every = counts.total + counts.mtp
    held = (every - counts.experts) / degrees.dp_shard
    held += counts.experts / (degrees.efsdp * degrees.ep)
    rows = [(name, held * size) for name, size in _STATE_BYTES.items()]
    # the root (embedding, final norm, head) stays gathered; of the blocks one, or all
    blocks = counts.blocks(degrees.ep)
    root = every - counts.blocks(1).sum
    gathered = root + (blocks.largest if config.parallel.reshard_after_forward else blocks.sum)
    size = 4 if config.precision.recipe == "fp32" else 2
    rows.append(("gathered weights", gathered * size))
    total = sum(size for _, size in rows)
    text = [f"  {name:<22} {_size(size):>10}" for name, size in rows]
    text += [f"  {'sum':<22} {_size(total):>10}   activations come on top, of these"]
    tokens, dispatch = config.train.micro_batch * config.data.seq_len, config.parallel.dispatch
    for name, worst, meaning in (
        ("expert rows", False, "routed evenly"),
        ("expert rows, at worst", True, "in every layer all tokens to the experts of one rank"),
    ):
        memory = row_memory(tokens, config.model, degrees.ep, dispatch, size, worst)
        text.append(f"  {name:<22} {_size(sum(memory)):>10}   {meaning}")
    return text


def _size(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024 or unit == "GiB":
            return f"{n_bytes:,.1f} {unit}"
        n_bytes /= 1024
    raise AssertionError
