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
from train.data.open_run_data import open_run_data
from train.validation import validate_sources


def validate(source: Path, overrides: list[str]) -> dict[str, float]:
    """The validation metrics of the newest checkpoint of `source`, by their names in
    `train.report.metrics`."""
    manifest = checkpoint.read_manifest(checkpoint.find(source))
    checkpoint.verify_files(manifest)
    place = str(manifest.folder / "manifest.json")
    config = from_dict(unflatten(manifest.config), place, overrides)
    ranks = start_ranks(config.train.threads)
    try:
        data = open_run_data(
            config, ranks, [], lambda line: print(line, file=sys.stderr, flush=True)
        )
        if not data.validated:
            raise UserError(f"data.seq_len = {config.data.seq_len}: not one held-out sequence")
        model = _load(manifest, config, ranks.device)
        found = validate_sources(
            model, data.validated, config.validation.sequences, config.train.micro_batch,
            ranks.device, rank=0, n_ranks=1,
        )  # fmt: skip
        assert found is not None, "nothing stops it"
        return found
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
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        if not arguments or arguments[0].startswith("-"):
            raise UserError("python -m scripts.validate CHECKPOINT [--section.key=value ...]")
        found = validate(local_path(arguments[0]), arguments[1:])
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in (key.partition("/")[2] for key in found if key.startswith("validation_loss")):
        key = f"/{name}" if name else ""
        bits = found.get(f"validation_bits_per_byte{key}")
        end = "" if bits is None else f", {bits:.5f} bits per byte"
        where = f"{arguments[0]}: {name}" if name else arguments[0]
        print(f"{where}: {found[f'validation_loss{key}']:.5f} nats per token{end}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
