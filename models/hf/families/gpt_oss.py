"""GPT-OSS: windows on every second layer, sinks, biases everywhere, clamped SwiGLU."""

from collections.abc import Iterator
from typing import Any

from configs.errors import UserError
from configs.model import ModelConfig, MoEConfig
from models.hf.config.config_reader import Family, HFConfigReader, clashes, plain_softmax_clashes
from models.hf.config.rope import rope_of
from models.hf.families.qwen3 import common_sizes, gqa_of
from models.hf.messages import shown
from models.hf.tensors import HfTensor, Layout, expert_tensors, gqa_tensors, plain


def _refusals(model: ModelConfig) -> list[str]:
    a, moe, rope = model.attention, model.moe, model.rope
    return plain_softmax_clashes(model) + clashes(
        attention__kind=a.kind != "gqa",
        attention__qk_norm=a.qk_norm != "none",
        attention__bias=not a.bias,
        attention__sinks=not a.sinks,
        attention__local=a.local == "chunk",
        attention__rope_on_full=not a.rope_on_full,
        rope__interleaved=rope.interleaved,
        rope__mscale=bool(rope.mscale or rope.mscale_all_dim),
        n_dense_layers=model.n_dense_layers > 0 or model.moe_every > 1,
        moe__norm_top_k=not moe.norm_top_k,
        moe__router_bias=not moe.router_bias,
        moe__expert_bias=not moe.expert_bias,
        moe__activation=moe.activation != "clamped_swiglu",
        moe__weight_on=moe.weight_on != "output",
    )


def _config(model: ModelConfig) -> dict[str, Any]:
    a = model.attention
    kinds = ("sliding_attention", "full_attention")
    layer_types = [kinds[a.is_full(i)] for i in range(model.n_layers)]
    return {
        "model_type": "gpt_oss",
        "num_local_experts": model.moe.n_experts,
        "num_experts": model.moe.n_experts,
        "experts_per_token": model.moe.top_k,
        "intermediate_size": model.moe.d_expert,
        "attention_bias": True,
        "sliding_window": a.local_size if kinds[0] in layer_types else 1,
        "layer_types": layer_types,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "output_router_logits": False,
        "router_aux_loss_coef": model.moe.global_aux_loss_coef,
    }


def _parse(values: HFConfigReader) -> ModelConfig:
    values.refuse("swiglu_alpha", 1.702)
    values.refuse("swiglu_limit", 7.0)
    sizes = common_sizes(values)
    kinds = values.listed("layer_types", str)
    kinds = _alternating(sizes["n_layers"]) if kinds is None else kinds
    also = "experts_per_token"  # in the published file; not used by any reader
    values.agree({k: values.raw[k] for k in ("num_experts_per_tok", also) if k in values.raw})
    if kinds == ["full_attention"] * sizes["n_layers"]:
        local: dict[str, Any] = {}
    else:
        local = {
            "local": "window",
            "local_size": values.integer("sliding_window"),
            "full_every": _full_every(kinds, sizes["n_layers"], values.place),
        }
    return ModelConfig(
        **sizes,
        attention=gqa_of(values, bias=True, sinks=True, **local),
        rope=rope_of(values, interleaved=False),
        moe=MoEConfig(
            n_experts=values.integer("num_local_experts", "num_experts", high=2**16),
            top_k=values.integer("num_experts_per_tok", high=2**16),
            d_expert=values.integer("intermediate_size"),
            router_bias=True,
            expert_bias=True,
            activation="clamped_swiglu",
            global_aux_loss_coef=values.coefficient("router_aux_loss_coef"),
        ),
    )


def _alternating(n_layers: int) -> list[str]:
    """The layer types of a config without `layer_types`."""
    return [("sliding_attention", "full_attention")[i % 2] for i in range(n_layers)]


def _full_every(kinds: list[str], n_layers: int, place: str) -> int:
    for every in range(2, n_layers + 2):
        full = [(i + 1) % every == 0 for i in range(n_layers)]
        if kinds == [("sliding_attention", "full_attention")[f] for f in full]:
            return every
    raise UserError(
        f"{place}: layer_types = {shown(kinds)}: must have full_attention on every n-th layer and "
        "sliding_attention elsewhere"
    )


def _layer(model: ModelConfig, layer: int, layout: Layout) -> Iterator[HfTensor]:
    yield from gqa_tensors(model, layer)
    theirs, ours, moe = f"model.layers.{layer}.mlp.", f"layers.{layer}.ffn.", model.moe
    yield plain(f"{theirs}router.weight", f"{ours}router.weight", moe.n_experts, model.d_model)
    yield plain(f"{theirs}router.bias", f"{ours}router.bias", moe.n_experts)
    experts = f"{theirs}experts.", f"{ours}experts."
    yield from expert_tensors(model, *experts, layout, fused="interleaved")


GPT_OSS = Family("GptOssForCausalLM", _refusals, _config, _parse, _layer, "fused")
