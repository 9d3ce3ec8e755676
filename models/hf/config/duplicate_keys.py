"""Keys of config.json that every architecture has, and keys with the same meaning as others.

Readers differ in which of two spellings they use. So both must agree; if they do not, the error
names both.
"""

import re
from typing import Any

from configs.errors import UserError
from configs.model import ModelConfig
from models.hf.config.config_reader import HFConfigReader
from models.hf.config.defaults import DTYPES, EXPERTS, MODEL_TYPES, UNUSED
from models.hf.messages import one_line, shown

_ELSEWHERE = {
    "per_layer_config": "layers that differ from each other are not supported",
    "configuration_files": "another file would take the place of this one",
    "compression_config": "only fp8 (in blocks) and mxfp4 in quantization_config are read",
    "transformers_weights": "weights are read from model.safetensors or its index alone",
    "fusion_config": "modules that are joined when they are loaded are not supported",
}
"""Keys that change the model and that are not supported here."""
_FLAGS = {
    "is_causal": (True, "tokens that see what follows them are not supported"),
    "mtp_hidden_states_first": (False, "another order of inputs is not supported"),
}
"""Keys that any class of transformers reads, with our value; null is an error."""
_THEIR_NAMES = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "top_k": "num_experts_per_tok",
    "n_groups": "n_group",
    "top_groups": "topk_group",
    "route_scale": "routed_scaling_factor",
    "theta": "rope_theta",
    "mscale": "mscale or mscale_all_dim",
    "original_length": "original_max_position_embeddings",
    "local_size": "sliding_window or attention_chunk_size",
    "n_dense_layers": "first_k_dense_replace or mlp_only_layers",
    "moe_every": "interleave_moe_layer_step",
}
_TYPE_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
_OUTSIDE_TOO = ("tie_word_embeddings", "quantization_config")
"""Keys that a model with images may have outside its `text_config`, for the language model."""


def architecture_of(raw: dict[str, Any], place: str, known: list[str]) -> str:
    """The one architecture in config.json, if it is one of `known`. Raises UserError."""
    given = raw.get("architectures")
    if not isinstance(given, list) or len(given) != 1 or given[0] not in known:
        raise UserError(
            f"{place}: architectures = {shown(given)}: must be one of {', '.join(known)}, in a list"
        )
    architecture: str = given[0]
    check_model_type(raw, place, architecture)
    return architecture


def check_model_type(raw: dict[str, Any], place: str, architecture: str) -> None:
    """transformers selects by `model_type`, others by `architectures`. Raises UserError."""
    expected = MODEL_TYPES[architecture]
    if raw.get("model_type", expected) != expected:
        raise UserError(
            f"{place}: model_type = {shown(raw['model_type'])}, but architectures = "
            f"['{architecture}'], whose model_type is {expected!r}"
        )


def language_model(raw: dict[str, Any], place: str, architecture: str) -> dict[str, Any]:
    """The config of the language model within that of a model with images. Raises UserError."""
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise UserError(f"{place}: text_config = {shown(text)}: must be an object")
    check_model_type(text, f"{place}: text_config", architecture)
    outside = {key: raw[key] for key in _OUTSIDE_TOO if key in raw}
    for key, value in outside.items():
        # without the key, the language model is not tied
        inner = text.get(key, False if key == "tie_word_embeddings" else value)
        if type(inner) is not type(value) or inner != value:
            raise UserError(
                f"{place}: {key} = {shown(value)}, but text_config.{key} = {shown(inner)}: "
                "they must agree"
            )
    return (
        outside | text | {"architectures": [architecture], "model_type": MODEL_TYPES[architecture]}
    )


def check_shared_keys(values: HFConfigReader) -> None:
    """Check the keys that all architectures share. Raises UserError."""
    raw, place = values.raw, values.place
    for key, why in _ELSEWHERE.items():
        if raw.get(key) is not None:
            raise UserError(f"{place}: {key} = {shown(raw[key])}: {why}")
    for key, (ours, why) in _FLAGS.items():
        if raw.get(key, ours) is not ours:
            wanted = str(ours).lower()
            raise UserError(f"{place}: {key} = {shown(raw[key])}: must be {wanted}: {why}")
    for key, types in UNUSED.items():
        if key in raw and type(raw[key]) not in types:
            wanted = " or ".join(_TYPE_NAMES[kind] for kind in types)
            raise UserError(f"{place}: {key} = {shown(raw[key])}: wrong type, must be {wanted}")
    ends = raw.get("eos_token_id")
    if isinstance(ends, list) and not all(type(end) is int for end in ends):
        raise UserError(f"{place}: eos_token_id = {shown(ends)}: wrong type, must be integers")
    precision = {key: raw[key] for key in ("dtype", "torch_dtype") if raw.get(key) is not None}
    for key, value in precision.items():
        if value not in DTYPES:
            raise UserError(f"{place}: {key} = {shown(value)}: must be one of {', '.join(DTYPES)}")
    values.agree(precision)


def in_their_names(error: UserError, values: HFConfigReader) -> UserError:
    """Replace our setting names in an error of our own rules by the keys of config.json."""
    prefix, text = f"{values.place}: ", one_line(error)
    if text.startswith(prefix):
        return UserError(text)  # it already uses them
    theirs = _THEIR_NAMES | {"n_experts": next((k for k in EXPERTS if k in values.raw), EXPERTS[0])}
    for expert_width in ("moe_intermediate_size", "intermediate_size"):
        if expert_width in values.raw:
            theirs["d_expert"] = expert_width
            break
    words = re.sub(r"[a-z]\w*", lambda word: theirs.get(word[0], word[0]), text)
    return UserError(prefix + words)


def check_second_spellings(values: HFConfigReader, model: ModelConfig) -> None:
    """Check that second spellings agree with the values that were read. Raises UserError."""
    values.agree({key: values.raw[key] for key in EXPERTS if key in values.raw})
    kinds = values.listed("mlp_layer_types", str)
    expected = ["sparse" if model.is_moe(i) else "dense" for i in range(model.n_layers)]
    if kinds not in (None, expected):
        raise UserError(
            f"{values.place}: mlp_layer_types = {shown(kinds)}, but the other keys make dense the "
            f"layers {shown([i for i, kind in enumerate(expected) if kind == 'dense'])}"
        )
