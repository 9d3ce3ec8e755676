"""Dense checkpoints (Llama, Mistral, Qwen3): what upcycling starts from.

They are read, never written, so they are no `Family` of the export table: a dense model is our
decoder with all layers dense. The names are those of the MoE families (grouped-query attention,
SwiGLU); what differs is `config.json`, where older writers leave keys out.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.model import Model, Moe
from configs.rules import ConfigError
from models.decoder import Decoder
from models.hf.folder import RawTensor, raw_tensors, read_json
from models.hf.mapped import MappedFiles
from models.hf.qwen3 import common_sizes, gqa_of
from models.hf.tensors import HfTensor, gqa_tensors, outer_tensors, swiglu_tensors
from models.hf.values import Values

_QK_NORM = {"LlamaForCausalLM": "none", "MistralForCausalLM": "none", "Qwen3ForCausalLM": "rms"}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class DenseCheckpoint:
    """A dense checkpoint whose names and shapes were checked; no weight is in memory yet."""

    place: str
    """What errors call it."""
    architecture: str
    model: Model
    """Our decoder with all layers dense."""
    max_positions: int
    """Longest sequence it was made for, tokens."""
    read: Callable[[str], Tensor]
    """Gives a tensor by its Hugging Face name."""

    def parts(self) -> Iterator[dict[str, Tensor]]:
        """The weights by our names, fp32: layer by layer, and last what is outside of them."""
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in Decoder(self.model).named_parameters()}
        for tensors in _parts(self.model):
            part: dict[str, Tensor] = {}
            for t in tensors:
                assert t.ours is not None
                ours = part.setdefault(t.ours, torch.empty(shapes[t.ours]))
                value = self.read(t.name)
                if value.dtype not in _FLOATS:
                    raise ConfigError(
                        f"{self.place}: {t.name} is {value.dtype}: quantised weights are not read"
                    )
                if not value.isfinite().all():
                    raise ConfigError(f"{self.place}: {t.name} holds values that are not finite")
                ours[t.index].copy_(t.from_hf(value, ours[t.index].shape))
            yield part


def open_dense(folder: Path) -> DenseCheckpoint:
    """The checkpoint in a Hugging Face folder (`config.json`, safetensors). Raises ConfigError."""
    place = folder / "config.json"
    wanted = "name a folder with config.json and *.safetensors"
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; {wanted}")
    try:
        raw = read_json(place)
    except FileNotFoundError:
        raise ConfigError(f"{place}: no such file; {wanted}") from None
    model = dense_model(raw, str(place))
    expected = {t.name: t for t in dense_tensors(model)}
    files = MappedFiles()
    found, _ = raw_tensors(folder, files)
    _check(folder, found, expected, _leftovers(model))
    return DenseCheckpoint(
        place=str(folder),
        architecture=raw["architectures"][0],
        model=model,
        max_positions=Values(raw, str(place)).integer("max_position_embeddings"),
        read=lambda name: files.slice(found[name].path, name),
    )


def _check(
    folder: Path,
    found: dict[str, RawTensor],
    expected: dict[str, HfTensor],
    ignored: re.Pattern[str],
) -> None:
    """Compare names and shapes with what the model needs. Raises ConfigError."""
    missing = expected.keys() - found.keys()
    extra = {n for n in found.keys() - expected.keys() if not ignored.fullmatch(n)}
    for kind, names in (("missing", missing), ("unexpected", extra)):
        if names:
            raise ConfigError(f"{folder}: {len(names)} tensors {kind}, the first is {min(names)}")
    for name, t in expected.items():
        if found[name].shape != t.shape:
            raise ConfigError(
                f"{found[name].path}: {name} has shape {list(found[name].shape)}, "
                f"config.json asks for {list(t.shape)}"
            )


def dense_model(raw: dict[str, Any], place: str) -> Model:
    """Our model for the `config.json` of a dense checkpoint; ConfigError names the key at fault."""
    given = raw.get("architectures")
    architecture = given[0] if isinstance(given, list) and len(given) == 1 else None
    if not isinstance(architecture, str) or architecture not in _QK_NORM:
        known = ", ".join(_QK_NORM)
        raise ConfigError(f"{place}: architectures = {given!r}: dense ones read here: {known}")
    for key, why in _REFUSED.items():
        if raw.get(key):
            raise ConfigError(f"{place}: {key} = {raw[key]!r}: {why}")
    values = Values(raw, place)
    values.refuse("hidden_act", "silu")
    n_layers = values.integer("num_hidden_layers", high=10_000)
    values.refuse("layer_types", None, ["full_attention"] * n_layers)
    if raw.get("use_sliding_window") is not False:
        values.refuse("sliding_window", None)
    given_keys = {key: value for key, value in raw.items() if value is not None}
    values = Values(_left_out(values) | given_keys, place)
    d_ff = values.integer("intermediate_size")
    try:
        return Model(
            **common_sizes(values),
            attention=gqa_of(values, qk_norm=_QK_NORM[architecture]),
            rope=values.rope(interleaved=False),
            n_dense_layers=n_layers,
            d_ff=d_ff,
            moe=Moe(n_experts=1, top_k=1, d_expert=d_ff),  # stands in no layer
        )
    except ConfigError as error:
        raise ConfigError(f"{place}: {str(error).removeprefix(f'{place}: ')}") from None


_REFUSED = {
    "auto_map": "code of a checkpoint is never run, so what it computes is unknown",
    "quantization_config": "quantised weights are not read; save them in bf16 or fp32",
    "attention_bias": "only false is supported",
    "mlp_bias": "only false is supported",
}


def _left_out(values: Values) -> dict[str, Any]:
    """Keys that older writers leave out or set to null, as transformers fills them in."""
    heads = values.integer("num_attention_heads")
    filled = {
        "num_key_value_heads": heads,
        "head_dim": values.integer("hidden_size") // heads,
        "tie_word_embeddings": False,
    }
    return filled if values.raw.get("rope_parameters") else filled | {"rope_theta": 10000.0}


def dense_tensors(model: Model) -> Iterator[HfTensor]:
    """Every tensor of a dense checkpoint."""
    for part in _parts(model):
        yield from part


def _parts(model: Model) -> Iterator[list[HfTensor]]:
    """The tensors of every layer, and last those outside of the layers."""
    for layer in range(model.n_layers):
        names = f"model.layers.{layer}.mlp.", f"layers.{layer}.ffn."
        ffn = swiglu_tensors(*names, model.d_ff, model.d_model)
        yield [*gqa_tensors(model, layer), *ffn]
    before, after = outer_tensors(model)
    yield [*before, *after]


def _leftovers(model: Model) -> re.Pattern[str]:
    """Tensors that carry nothing: RoPE tables of old writers, and the head where it is tied."""
    tables = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    return re.compile(rf"{tables}|lm_head\.weight" if model.tie_embeddings else tables)
