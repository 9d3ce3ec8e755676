"""Selects the Hugging Face architecture of a model, and converts its config and tensors.

The features of a model determine the architecture: the first of `FAMILIES` that can express all of
them. The model code never depends on the family.
"""

from collections.abc import Container, Iterator
from functools import lru_cache
from typing import Any

from configs.errors import UserError
from configs.model import ModelConfig
from models.hf.config.config_reader import Family, HFConfigReader, clashes
from models.hf.config.duplicate_keys import (
    architecture_of,
    check_model_type,
    check_second_spellings,
    check_shared_keys,
    in_their_names,
    language_model,
)
from models.hf.config.rope import rope_parameters
from models.hf.config.undetermined_settings import (
    KEY,
    undetermined_settings,
    with_undetermined_settings,
)
from models.hf.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from models.hf.families.glm4 import GLM4
from models.hf.families.gpt_oss import GPT_OSS
from models.hf.families.llama4 import LLAMA4
from models.hf.families.mixtral import MIXTRAL
from models.hf.families.qwen3 import QWEN3
from models.hf.tensors import HfTensor, Layout, mtp_tensors, outer_tensors

_MOST_EXPERTS = 2**20
"""More tensor names than any real model has; checked before they are created."""
LLAMA4_WITH_IMAGES = "Llama4ForConditionalGeneration"
"""How Llama 4 is published: the language model under `language_model.`, next to a vision model."""
FAMILIES = (QWEN3, GLM4, MIXTRAL, DEEPSEEK_V3, DEEPSEEK_V2, GPT_OSS, LLAMA4)
_NEVER_TIED = (GLM4, DEEPSEEK_V3, DEEPSEEK_V2, GPT_OSS)
"""No published model of these ties its embeddings, so vLLM ignores tie_word_embeddings: its GLM-4
silently computed with a head of zeros. llama.cpp requires GPT-OSS's head."""


def architecture(model: ModelConfig) -> str:
    """The Hugging Face architecture that expresses `model`. Raises UserError if there is none."""
    return _family(model).architecture


def publishes_fused_experts(model: ModelConfig) -> bool:
    """Whether the published checkpoints of its family store the experts of a layer in one
    tensor."""
    return _family(model).layout == "fused"


@lru_cache(maxsize=64)
def _family(model: ModelConfig) -> Family:
    """The first family that can express `model` and whose config.json converts back to it."""
    if model.moe.force_balance:
        raise UserError(
            "model.moe.force_balance = true: no other program routes so; for benchmarks"
        )
    refusals = [(_refusals(family, model), family) for family in FAMILIES]
    for refused, family in refusals:
        if not refused and not family.unloadable(model):
            _check_readable(family, model)
            return family
    refused, nearest = min(refusals, key=lambda pair: len(pair[0]))
    keys = ", ".join(f"model.{key}" for key in refused or nearest.unloadable(model))
    raise UserError(
        f"no Hugging Face architecture expresses this model; the nearest, {nearest.architecture}, "
        f"needs another {keys}"
    )


def _refusals(family: Family, model: ModelConfig) -> list[str]:
    """Settings of `model` that `family` cannot express. Readers assume experts in a layer beyond
    the last, for any position of the dense layers."""
    has_mtp = family.has_mtp and model.is_moe(model.n_layers - 1)
    return family.refusals(model) + clashes(
        mtp_depth=model.mtp_depth > 0 and not has_mtp, moe__force_balance=model.moe.force_balance
    )


def _check_readable(family: Family, model: ModelConfig) -> None:
    """Raise UserError if the model's config.json would not convert back to the model."""
    described, name = _keys(family, model), family.architecture
    try:
        as_read = _parse(family, described, f"its config.json as {name}")
    except UserError as error:
        raise UserError(f"no Hugging Face architecture expresses this model: {error}") from None
    if _keys(family, as_read) != described:
        keys = ", ".join(f"model.{key}" for key in undetermined_settings(model, as_read))
        raise UserError(
            f"no Hugging Face architecture expresses this model; {name} would be read with another "
            f"value of one of {keys}"
        )


def hf_config(
    model: ModelConfig, *, max_positions: int, eos_token_id: int, dtype: str
) -> dict[str, Any]:
    """The export's `config.json`; `from_hf_config` converts it to `model`.

    It has both old and new spellings of keys on which readers disagree (`rope_theta` and
    `rope_parameters`, `num_experts` and `num_local_experts`).
    """
    family = _family(model)
    described = _keys(family, model) | {
        "max_position_embeddings": max_positions,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    open_settings = undetermined_settings(model, _parse(family, described, "config.json"))
    return described | ({KEY: open_settings} if open_settings else {})


def _keys(family: Family, model: ModelConfig) -> dict[str, Any]:
    """The keys of `config.json` for the model itself; the same for models that compute the same."""
    a, rope = model.attention, rope_parameters(model.rope)
    common: dict[str, Any] = {
        "architectures": [family.architecture],
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": a.n_heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "num_experts_per_tok": model.moe.top_k,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope.theta,
        "rope_parameters": rope,
        "rope_scaling": None if model.rope.scaling == "none" else rope,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": model.init_std,
    }
    return common | family.config(model)


def text_config(config: dict[str, Any], place: str) -> dict[str, Any]:
    """The `config.json`, or the part for the language model of a Llama 4 with images."""
    if config.get("architectures") != [LLAMA4_WITH_IMAGES]:
        return config
    check_model_type(config, place, LLAMA4_WITH_IMAGES)
    return language_model(config, place, LLAMA4.architecture)


def from_hf_config(config: dict[str, Any], place: str) -> ModelConfig:
    """Our model for a `config.json`.

    place: the file's name in errors. Raises UserError naming the key that is missing, has the wrong
    type or size, contradicts another, or requires a feature this decoder does not have.
    """
    config = text_config(config, place)
    families = {family.architecture: family for family in FAMILIES}
    family = families[architecture_of(config, place, [*families, LLAMA4_WITH_IMAGES])]
    model = _parse(family, config, place)
    described = _keys(family, model)
    return with_undetermined_settings(
        model,
        config,
        place,
        lambda other: not _refusals(family, other) and _keys(family, other) == described,
    )


def _parse(family: Family, config: dict[str, Any], place: str) -> ModelConfig:
    values = HFConfigReader(config, place, family.architecture)
    values.refuse("hidden_act", "silu")
    values.refuse("attention_bias", family is GPT_OSS)
    check_shared_keys(values)
    try:
        model = family.parse(values)
        if (model.n_layers + model.mtp_depth) * model.moe.n_experts > _MOST_EXPERTS:
            raise UserError(f"more than {_MOST_EXPERTS} experts in all layers together")
        refused = family.refusals(model)
        if refused:
            raise UserError(f"{family.architecture} has no model with this model.{refused[0]}")
        check_second_spellings(values, model)
        return model
    except UserError as error:  # our own rules, in our names: add the file that broke them
        raise in_their_names(error, values) from None


def hf_tensors(model: ModelConfig, given: Container[str] | None = None) -> Iterator[HfTensor]:
    """Every tensor of `model` in Hugging Face form, layer by layer; MTP modules are layers beyond
    the last.

    given: the names in a checkpoint; each layer has the layout of which the fewest names are
    missing. None: the layout of the family's published checkpoints.
    """
    family, (before, after) = _family(model), outer_tensors(model)
    yield from before
    for layer in range(model.n_layers + model.mtp_depth):
        tensors = list(family.layer(model, layer, family.layout))
        if given is not None and any(t.name not in given for t in tensors):
            other: Layout = "fused" if family.layout == "per_expert" else "per_expert"
            forms = [tensors, list(family.layer(model, layer, other))]
            # as a share: a layer has few fused tensors and hundreds of single ones
            tensors = min(forms, key=lambda f: sum(t.name not in given for t in f) / len(f))
        yield from tensors
        if layer >= model.n_layers:
            yield from mtp_tensors(model, layer)
    yield from after
    if model.tie_embeddings and family in _NEVER_TIED:
        shape = model.vocab_size, model.d_model
        yield HfTensor("lm_head.weight", "embed.weight", (), shape, is_copy=True)
