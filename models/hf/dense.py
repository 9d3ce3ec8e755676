"""Dense checkpoints (Llama, Mistral, Qwen3), from which upcycling starts.

They are read, never written, so they are no `Family` of the export table: a dense model is our
decoder with all layers dense. The names are those of the MoE families (grouped-query attention,
SwiGLU); only `config.json` differs, in which older writers omit keys.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from configs.model import ModelConfig, MoEConfig
from models.decoder import Decoder
from models.hf.config.config_reader import HFConfigReader
from models.hf.config.duplicate_keys import (
    architecture_of,
    check_second_spellings,
    check_shared_keys,
    in_their_names,
)
from models.hf.config.rope import rope_of
from models.hf.copies import same_rows
from models.hf.families.qwen3 import common_sizes, gqa_of, only_full_attention
from models.hf.folder import RawTensor, raw_tensors, read_json, refuse_code
from models.hf.messages import located, named, one_line, shown
from models.hf.safetensors_files import MappedFiles
from models.hf.tensors import HfTensor, gqa_tensors, outer_tensors, swiglu_tensors

_QK_NORM = {"LlamaForCausalLM": "none", "MistralForCausalLM": "none", "Qwen3ForCausalLM": "rms"}
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_PIECE_BYTES = 2**26
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class DenseCheckpoint:
    """A dense checkpoint whose names and shapes were checked; no weight is in memory yet."""

    place: str
    """Its name in error messages."""
    architecture: str
    model: ModelConfig
    """Our decoder with all layers dense."""
    max_positions: int
    """Longest sequence it was trained for, tokens."""
    read: Callable[[str], Tensor]
    """Returns a tensor by its Hugging Face name."""
    left_out: tuple[str, ...] = ()
    """Descriptions of files that were not read."""

    def parts(self) -> Iterator[dict[str, Tensor]]:
        """The weights by our names, fp32: layer by layer, and last those outside the layers."""
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in Decoder(self.model).named_parameters()}
        for tensors in _parts(self.model):
            part: dict[str, Tensor] = {}
            for t in tensors:
                assert t.ours is not None
                ours = part.setdefault(t.ours, torch.empty(shapes[t.ours]))
                value = self.read(t.name)
                if value.dtype not in _FLOATS:
                    raise UserError(
                        f"{self.place}: {t.name} is {value.dtype}: quantized weights are not read"
                    )
                if not value.isfinite().all():
                    raise UserError(f"{self.place}: {t.name} holds values that are not finite")
                ours[t.index].copy_(t.from_hf(value, ours[t.index].shape))
            yield part


def open_dense(folder: Path) -> DenseCheckpoint:
    """The checkpoint in a Hugging Face folder (`config.json`, safetensors). Raises UserError."""
    place = folder / "config.json"
    wanted = "name a folder with config.json and *.safetensors"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {wanted}")
    try:
        raw = read_json(place)
    except FileNotFoundError:
        raise UserError(f"{place}: no such file; {wanted}") from None
    model, architecture = dense_model(raw, str(place)), raw["architectures"][0]
    expected = {t.name: t for t in dense_tensors(model)}
    files = MappedFiles()
    found, left_out = raw_tensors(folder, files)
    _check(folder, found, expected, _leftovers(model))
    if model.tie_embeddings and _HEAD in found:
        _check_tied(place, found, files)
    return DenseCheckpoint(
        place=str(folder),
        architecture=architecture,
        model=model,
        max_positions=HFConfigReader(raw, str(place), architecture).integer(
            "max_position_embeddings"
        ),
        read=lambda name: _rows(files, found[name]),
        left_out=tuple(left_out),
    )


def _check_tied(place: Path, found: dict[str, RawTensor], files: MappedFiles) -> None:
    """Check that a head next to a tied embedding equals the embedding. Raises UserError."""
    head, embedding = found[_HEAD], found[_EMBEDDING]
    read = [partial(_rows, files, tensor) for tensor in (head, embedding)]
    if not same_rows((head.shape, embedding.shape), (read[0], read[1]), _PIECE_BYTES):
        raise UserError(
            f"{place}: tie_word_embeddings is true, but {_HEAD} is another matrix than "
            f"{_EMBEDDING}; set it to false"
        )


def _rows(
    files: MappedFiles, tensor: RawTensor, start: int | None = None, stop: int | None = None
) -> Tensor:
    from safetensors import SafetensorError

    index = () if start is None else (slice(start, stop),)
    try:
        return files.slice(tensor.path, tensor.name, index)
    except (SafetensorError, OSError) as error:
        place = f"{located(tensor.path)}: {named(tensor.name)}"
        raise UserError(f"{place}: unreadable: {one_line(error)}") from None


def _check(
    folder: Path,
    found: dict[str, RawTensor],
    expected: dict[str, HfTensor],
    ignored: re.Pattern[str],
) -> None:
    """Compare names and shapes with those of the model. Raises UserError."""
    missing = expected.keys() - found.keys()
    extra = {n for n in found.keys() - expected.keys() if not ignored.fullmatch(n)}
    for kind, names in (("missing", missing), ("unexpected", extra)):
        if names:
            raise UserError(
                f"{folder}: {len(names)} tensors {kind}, the first is {named(min(names))}"
            )
    for name, t in expected.items():
        if found[name].shape != t.shape:
            raise UserError(
                f"{located(found[name].path)}: {name} has shape {shown(list(found[name].shape))}, "
                f"config.json asks for {list(t.shape)}"
            )


def dense_model(raw: dict[str, Any], place: str) -> ModelConfig:
    """Our model for the `config.json` of a dense checkpoint; UserError names the invalid key."""
    values = HFConfigReader(raw, place, architecture_of(raw, place, list(_QK_NORM)))
    refuse_code(raw, place)
    quantized = raw.get("quantization_config")
    if quantized is not None:
        raise UserError(
            f"{place}: quantization_config = {shown(quantized)}: quantized weights are not read; "
            "save them in bf16 or fp32"
        )
    values.refuse("hidden_act", "silu")
    values.refuse("attention_bias", False)
    values.refuse("mlp_bias", False)
    check_shared_keys(values)
    if "use_sliding_window" in values.defaults and not values.flag("use_sliding_window"):
        values.integer_or_none("sliding_window", low=0)  # only Qwen3 has a switch for it
    else:
        values.refuse("sliding_window", None)
    only_full_attention(values)
    d_ff = values.integer("intermediate_size")
    n_layers = values.integer("num_hidden_layers", high=10_000)
    try:
        model = ModelConfig(
            **common_sizes(values),
            attention=gqa_of(values, qk_norm=_QK_NORM[values.architecture]),
            rope=rope_of(values, interleaved=False),
            n_dense_layers=n_layers,
            d_ff=d_ff,
            moe=MoEConfig(n_experts=1, top_k=1, d_expert=d_ff),  # used in no layer
        )
        if model.rope.mscale or model.rope.mscale_all_dim:
            raise UserError("only DeepSeek's attention has RoPE's mscale")
        check_second_spellings(values, model)
        return model
    except UserError as error:
        raise in_their_names(error, values) from None


def dense_tensors(model: ModelConfig) -> Iterator[HfTensor]:
    """Every tensor of a dense checkpoint."""
    for part in _parts(model):
        yield from part


def _parts(model: ModelConfig) -> Iterator[list[HfTensor]]:
    """The tensors of every layer, and last those outside the layers."""
    for layer in range(model.n_layers):
        names = f"model.layers.{layer}.mlp.", f"layers.{layer}.ffn."
        ffn = swiglu_tensors(*names, model.d_ff, model.d_model)
        yield [*gqa_tensors(model, layer), *ffn]
    before, after = outer_tensors(model)
    yield [*before, *after]


def _leftovers(model: ModelConfig) -> re.Pattern[str]:
    """Redundant tensors: RoPE tables of old writers, and the head if it is tied."""
    tables = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    return re.compile(rf"{tables}|lm_head\.weight" if model.tie_embeddings else tables)
