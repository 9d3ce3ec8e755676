"""Reading and writing a Hugging Face folder: safetensors shards, index, config.json.

Writing goes shard by shard, so the largest shard bounds the memory; reading checks every name and
shape against the model before it copies, and refuses what is missing, unexpected or misshapen.
Only safetensors are read: a pickle is refused by its name.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.model import Model
from configs.rules import ConfigError
from models.decoder import Decoder
from models.hf.table import from_hf_config, hf_tensors
from models.hf.tensors import HfTensor
from models.router import routers

SHARD_BYTES = 5 * 2**30
"""Shards are closed before they grow beyond this."""
INDEX = "model.safetensors.index.json"


def write_tensors(
    folder: Path,
    model: Model,
    read: Callable[[str, tuple[int, ...]], Tensor],
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write every tensor of `model` into `folder` and return the files.

    read: gives `ours[index]` for one of our names, in fp32.
    """
    from safetensors.torch import save_file

    shards = _split(list(hf_tensors(model)), dtype, shard_bytes)
    weight_map: dict[str, str] = {}
    total_size, files = 0, []
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for t in shard:
            value = torch.zeros(t.shape) if t.ours is None else t.to_hf(read(t.ours, t.index))
            tensors[t.name] = value.to(torch.float32 if t.keep_fp32 else dtype).contiguous()
            total_size += tensors[t.name].nbytes
            weight_map[t.name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files.append(folder / file)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return files


def _split(tensors: list[HfTensor], dtype: torch.dtype, shard_bytes: int) -> list[list[HfTensor]]:
    shards: list[list[HfTensor]] = [[]]
    size = 0
    for t in tensors:
        n_bytes = torch.Size(t.shape).numel() * (4 if t.keep_fp32 else dtype.itemsize)
        if shards[-1] and size + n_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(t)
        size += n_bytes
    return shards


def read_config(folder: Path) -> tuple[Model, dict[str, Any]]:
    """The model and the raw `config.json` of a Hugging Face folder."""
    place = folder / "config.json"
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name an export such as runs/demo/export")
    try:
        raw = json.loads(place.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{place}: no such file; is {folder} an export?") from None
    except ValueError as error:
        raise ConfigError(f"{place}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{place}: must hold one JSON object")
    return from_hf_config(raw, str(place)), raw


def read_model(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> Decoder:
    """The decoder of an export, in evaluation mode. Biases that are fp32 on disk stay fp32."""
    model, _ = read_config(folder)
    files = _open_files(folder, {t.name: t for t in hf_tensors(model)})
    with torch.device("meta"):
        decoder = Decoder(model).to(dtype)
    for router in routers(decoder):
        router.float_bias()
    decoder.to_empty(device=device)
    for buffer in decoder.buffers():
        buffer.zero_()
    state = decoder.state_dict(keep_vars=True)
    with torch.no_grad():
        for t in hf_tensors(model):
            if t.ours is not None:
                part = state[t.ours][t.index]
                part.copy_(t.from_hf(files[t.name].get_tensor(t.name), part.shape))
    return decoder.eval()


def _open_files(folder: Path, expected: dict[str, HfTensor]) -> dict[str, Any]:
    """The open file of every tensor, after names and shapes have been checked."""
    from safetensors import SafetensorError, safe_open

    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        others = sorted(p.name for p in folder.glob("*.bin")) + sorted(
            p.name for p in folder.glob("*.pt*")
        )
        why = f" (pickles such as {others[0]} are not read)" if others else ""
        raise ConfigError(f"{folder}: has no *.safetensors{why}")
    found: dict[str, Any] = {}
    for path in paths:
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError, struct.error) as error:
            raise ConfigError(f"{path}: unreadable safetensors file: {error}") from None
        for name in file.keys():
            if name in expected and tuple(file.get_slice(name).get_shape()) != expected[name].shape:
                raise ConfigError(
                    f"{path}: {name} has shape {file.get_slice(name).get_shape()}, "
                    f"config.json asks for {list(expected[name].shape)}"
                )
            found[name] = file
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    for kind, names in (("missing", missing), ("unexpected", extra)):
        if names:
            raise ConfigError(f"{folder}: {len(names)} tensors {kind}, the first is {min(names)}")
    return found
