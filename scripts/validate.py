"""`python -m scripts.validate CHECKPOINT [--section.key=value ...]`: loss on held-out text.

CHECKPOINT is a run folder or one of its checkpoints. Data and sizes are those of its config,
changed by the overrides. It compares checkpoints that were trained differently, or not at all, on
the same text and in the same dtype: `--precision.recipe=fp32`. One process, no optimizer.
"""

import sys
from pathlib import Path

import torch

from configs.errors import UserError
from configs.loader import from_dict, unflatten
from configs.paths import local_path
from configs.schema import JobConfig
from models.decoder import Decoder
from models.fp8 import apply_fp8, check_device, fp8_weights
from models.router import routers
from parallel.ranks import start_ranks, stop_ranks
from train.checkpoint import checkpoint
from train.compute_dtype import compute_dtype
from train.data.batches import Sequences, validation_batches
from train.data.corpus import prepare
from train.validation import bits_per_byte, validation_loss


def validate(source: Path, overrides: list[str]) -> tuple[float, float]:
    """Loss in nats per token and bits per byte of the newest checkpoint of `source`."""
    manifest = checkpoint.read_manifest(checkpoint.find(source))
    checkpoint.verify_files(manifest)
    place = str(manifest.folder / "manifest.json")
    config = from_dict(unflatten(manifest.config), place, overrides)
    ranks = start_ranks(config.train.threads)
    try:
        corpus = prepare(config, lambda line: print(line, file=sys.stderr, flush=True))
        held_out = Sequences(corpus.validation, config.data.seq_len, corpus.eot)
        if not held_out.count:
            raise UserError(f"data.seq_len = {config.data.seq_len}: not one held-out sequence")
        micro, limit = config.train.micro_batch, config.validation.sequences
        batches = validation_batches(held_out, limit, micro, rank=0, n_ranks=1)
        model = _load(manifest, config, ranks.device)
        loss = validation_loss(model, batches, held_out.first(), ranks.device)
        assert loss is not None, "nothing stops it"
        return loss, bits_per_byte(loss, len(corpus.validation), corpus.validation_bytes)
    finally:
        stop_ranks()


def _load(manifest: checkpoint.Manifest, config: JobConfig, device: torch.device) -> Decoder:
    with torch.device("meta"):
        model = Decoder(config.model)
    if config.precision.recipe == "fp8_blockwise":
        names = apply_fp8(model, config.precision.fp8)
        check_device(device, names[0])
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.zero_()
    state = model.state_dict(keep_vars=True)
    checkpoint.load(manifest, {f"model.{name}": tensor for name, tensor in state.items()})
    model.to(device)
    masters = fp8_weights(model)  # quantized at each use, from fp32 as in training
    for name, parameter in model.named_parameters():
        if name not in masters:
            parameter.data = parameter.data.to(compute_dtype(config, device))
    for router in routers(model):
        router.float_bias()
    return model


def main(arguments: list[str]) -> int:
    """Print one line; returns the exit code."""
    try:
        if not arguments or arguments[0].startswith("-"):
            raise UserError("python -m scripts.validate CHECKPOINT [--section.key=value ...]")
        loss, bits = validate(local_path(arguments[0]), arguments[1:])
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments[0]}: {loss:.5f} nats per token, {bits:.5f} bits per byte")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
