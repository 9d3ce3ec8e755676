"""Reading and writing a Hugging Face folder: safetensors shards, index, config.json.

Writing proceeds shard by shard, and within a shard by pieces of rows, so that one shard and one
piece (in FP8: of whole blocks) are in memory. Reading checks every name and shape against the model
before memory of their size is allocated (`models.hf.checkpoint`).
"""

import json
import math
from collections.abc import Callable, Container, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from configs.model import ModelConfig
from kernels.fp8 import BLOCK
from models.decoder import Decoder
from models.hf.checkpoint import PIECE_BYTES, HFCheckpoint
from models.hf.folder import INDEX, read_json
from models.hf.fp8_blocks import SCALE, fp8_plan, grid, quantize
from models.hf.fp8_weights import load_fp8, use_fp8
from models.hf.safetensors_files import save_tensors
from models.hf.sharding import Sharding, Unsharded
from models.hf.table import from_hf_config, hf_tensors
from models.hf.tensors import HfTensor
from models.router import routers

SHARD_BYTES = 5 * 2**30
"""Maximum size of a shard."""
Index = tuple[int | slice, ...]
"""An element of a tensor's leading dimensions, then a range of rows."""


def write_tensors(
    folder: Path,
    model: ModelConfig,
    read: Callable[[str, Index], Tensor],
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write every tensor of `model` into `folder` and return the files.

    Args:
        folder: Where the files are written.
        model: The model.
        read: Returns `ours[index]` for one of our names, in fp32. The index ends with a slice of
            rows.
        dtype: float8_e4m3fn quantizes the tensors of `fp8_plan` and rounds the others to bf16.
        shard_bytes: Maximum size of a shard.
    """
    quantized: frozenset[str] = frozenset()
    if dtype == torch.float8_e4m3fn:
        quantized, dtype = fp8_plan(model).quantized, torch.bfloat16
    shards = _split(list(hf_tensors(model)), dtype, quantized, shard_bytes)
    weight_map: dict[str, str] = {}
    total_size, files = 0, []
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for t in shard:
            if t.name in quantized:
                tensors |= _gather_fp8(t, read, shard_bytes)
            else:
                tensors[t.name] = _gather(t, read, dtype, shard_bytes)
        save_tensors(tensors, folder / file, {"format": "pt"})
        total_size += sum(value.nbytes for value in tensors.values())
        weight_map |= dict.fromkeys(tensors, file)
        del tensors  # before the next shard is gathered
        files.append(folder / file)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return files


def _gather(
    t: HfTensor, read: Callable[[str, Index], Tensor], dtype: torch.dtype, shard_bytes: int
) -> Tensor:
    """Their tensor, assembled from pieces that are small compared to a shard."""
    out = torch.zeros(t.shape, dtype=torch.float32 if t.keep_fp32 else dtype)
    if t.ours is not None:
        for rows in _pieces(t, shard_bytes):
            out[rows] = t.to_hf(read(t.ours, (*t.index, rows)))
            if not out[rows].isfinite().all():  # unusable for every reader, including our import
                kind = str(out.dtype).removeprefix("torch.")
                raise UserError(f"{t.name} holds inf or NaN as {kind}")
    return out


def _gather_fp8(
    t: HfTensor, read: Callable[[str, Index], Tensor], shard_bytes: int
) -> dict[str, Tensor]:
    """Their tensor in FP8 and its factors, from pieces of whole blocks."""
    data, scales = torch.zeros(t.shape, dtype=torch.float8_e4m3fn), torch.empty(grid(t.shape))
    for rows in _pieces(t, shard_bytes, step=BLOCK):
        value = torch.zeros(rows.stop - rows.start, t.shape[1])
        if t.ours is not None:
            value = t.to_hf(read(t.ours, (*t.index, rows)))
        blocks = slice(rows.start // BLOCK, -(-rows.stop // BLOCK))
        data[rows], scales[blocks] = quantize(value)
    if not scales.isfinite().all():
        raise UserError(f"{t.name} holds inf or NaN: FP8 would spread them over whole blocks")
    return {t.name: data, f"{t.name}{SCALE}": scales}


def _pieces(t: HfTensor, shard_bytes: int, step: int = 1) -> Iterator[slice]:
    """Ranges of rows, each but the last a multiple of `step`."""
    piece = min(PIECE_BYTES, shard_bytes // 8)
    rows = max(1, piece // max(4 * math.prod(t.shape[1:]) * step, 1)) * step
    for a in range(0, t.shape[0], rows):
        yield slice(a, min(a + rows, t.shape[0]))


def _n_bytes(t: HfTensor, dtype: torch.dtype, quantized: Container[str]) -> int:
    if t.name in quantized:
        return math.prod(t.shape) + 4 * math.prod(grid(t.shape))
    return math.prod(t.shape) * (4 if t.keep_fp32 else dtype.itemsize)


def _split(
    tensors: list[HfTensor], dtype: torch.dtype, quantized: Container[str], shard_bytes: int
) -> list[list[HfTensor]]:
    shards: list[list[HfTensor]] = [[]]
    size = 0
    for t in tensors:
        n_bytes = _n_bytes(t, dtype, quantized)
        if shards[-1] and size + n_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(t)
        size += n_bytes
    return shards


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model and the raw `config.json` of a Hugging Face folder."""
    place = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name an export such as runs/demo/export")
    try:
        raw = read_json(place)
    except FileNotFoundError:
        raise UserError(f"{place}: no such file; is {folder} an export?") from None
    return from_hf_config(raw, str(place)), raw


def read_model(
    folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu", *, mtp: bool = False,
    fp8: bool = False, sharding: Sharding | None = None,
) -> Decoder:  # fmt: skip
    """The decoder of an export, in evaluation mode. Biases that are fp32 on disk stay fp32.

    Args:
        folder: The export.
        dtype: Of the parameters.
        device: Of the parameters.
        mtp: Include MTP modules, if the folder has any; only training uses them.
        fp8: Keep weights that are stored in FP8 blocks in FP8, and compute in FP8.
        sharding: Divides the decoder among ranks; only this rank's part is read.
    """
    described, raw = read_config(folder)
    source = HFCheckpoint(folder, described if mtp else replace(described, mtp_depth=0), raw)
    sharding = sharding or Unsharded()
    with torch.device("meta"):
        decoder = Decoder(source.model).to(dtype)
    for router in routers(decoder):
        router.float_bias()
    if fp8:
        use_fp8(decoder, source)
    sharding.apply(decoder)
    boxes = load_fp8(decoder, source, sharding, device) if fp8 else {}
    decoder.to_empty(device=device)
    for buffer in decoder.buffers():
        buffer.zero_()
    with torch.no_grad():
        for name, tensor in decoder.state_dict(keep_vars=True).items():
            if name in source and name not in boxes:
                local, boxes[name] = sharding.part(tensor.detach())
                source.fill(name, local, boxes[name])
    source.check_complete(boxes)
    return decoder.eval()
