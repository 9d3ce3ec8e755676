"""Llama 4 (text): chunked attention, full layers without RoPE, weights on the expert input."""

from collections.abc import Iterator
from typing import Any

from configs.errors import UserError
from configs.model import ModelConfig, MoEConfig
from models.hf.config.config_reader import Family, HFConfigReader, clashes
from models.hf.config.rope import rope_of
from models.hf.families.qwen3 import common_sizes, gqa_of
from models.hf.messages import shown
from models.hf.tensors import HfTensor, Layout, expert_tensors, gqa_tensors, plain, swiglu_tensors


def _refusals(model: ModelConfig) -> list[str]:
    a, moe = model.attention, model.moe
    return clashes(
        attention__kind=a.kind != "gqa",
        attention__qk_norm=a.qk_norm == "rms",
        attention__bias=a.bias,
        attention__sinks=a.sinks,
        attention__local=a.local != "chunk",
        attention__rope_on_full=a.rope_on_full,
        rope__interleaved=not model.rope.interleaved,
        rope__mscale=bool(model.rope.mscale or model.rope.mscale_all_dim),
        n_dense_layers=model.n_dense_layers > 0,
        moe__score_func=moe.score_func != "sigmoid",
        moe__norm_top_k=moe.norm_top_k,
        moe__n_groups=moe.n_groups > 1,
        moe__router_bias=moe.router_bias,
        moe__expert_bias=moe.expert_bias,
        moe__activation=moe.activation != "swiglu",
        moe__weight_on=moe.weight_on != "input",
        moe__bias_update_rate=moe.bias_update_rate > 0,
        moe__n_shared_experts=moe.n_shared_experts != 1,
        moe__route_scale=moe.route_scale != 1.0,
    )


def _config(model: ModelConfig) -> dict[str, Any]:
    a, layers = model.attention, range(model.n_layers)
    kinds = ("chunked_attention", "full_attention")
    return {
        "model_type": "llama4_text",
        "num_local_experts": model.moe.n_experts,
        "num_experts": model.moe.n_experts,
        "intermediate_size": model.moe.d_expert,
        "intermediate_size_mlp": model.d_ff if model.moe_every > 1 else model.moe.d_expert,
        "interleave_moe_layer_step": model.moe_every,
        "moe_layers": [i for i in layers if model.is_moe(i)],
        "attention_chunk_size": a.local_size,
        "no_rope_layer_interval": a.full_every,
        "no_rope_layers": [int(a.has_rope(i)) for i in layers],
        "layer_types": [kinds[a.is_full(i)] for i in layers],
        "use_qk_norm": a.qk_norm == "l2",
        "attn_temperature_tuning": a.temperature_floor > 0,
        "floor_scale": a.temperature_floor or 8192,
        "attn_scale": a.temperature_scale,
        "output_router_logits": False,
        "router_aux_loss_coef": model.moe.global_aux_loss_coef,
        "router_jitter_noise": 0.0,
    }


def _parse(values: HFConfigReader) -> ModelConfig:
    sizes = common_sizes(values)
    layers = range(sizes["n_layers"])
    every = values.integer("no_rope_layer_interval", high=2**16)
    moe_every = values.integer("interleave_moe_layer_step", high=10_000)
    kinds = "full_attention", "chunked_attention"
    rotated = [int((i + 1) % every != 0) for i in layers]
    # transformers treats an empty list of the first as "not given"
    for key, given, expected, rule in (
        ("no_rope_layers", values.listed("no_rope_layers", int) or rotated, rotated,
         f"0 on every layer that no_rope_layer_interval = {every} ends"),
        ("layer_types", values.listed("layer_types", str), [kinds[r] for r in rotated],
         "full_attention where there is no RoPE"),
        ("moe_layers", values.listed("moe_layers", int),
         [i for i in layers if (i + 1) % moe_every == 0],
         f"every layer that interleave_moe_layer_step = {moe_every} ends"),
    ):  # fmt: skip
        if given not in (None, expected):
            raise UserError(f"{values.place}: {key} = {shown(given)}: must be {rule}")
    given = values.get("attn_temperature_tuning")
    # the first release wrote a 4 for true
    tuned = (type(given) is int and given == 4) or values.flag("attn_temperature_tuning")
    attention = gqa_of(
        values,
        qk_norm="l2" if values.flag("use_qk_norm") else "none",
        local="chunk",
        local_size=values.integer("attention_chunk_size"),
        full_every=every,
        rope_on_full=False,
        temperature_floor=values.integer("floor_scale") if tuned else 0,
        temperature_scale=values.number("attn_scale", high=1e3),
    )
    return ModelConfig(
        **sizes,
        attention=attention,
        rope=rope_of(values, interleaved=True),
        moe_every=moe_every,
        d_ff=values.integer("intermediate_size_mlp") if moe_every > 1 else 0,
        moe=MoEConfig(
            n_experts=values.integer("num_local_experts", high=2**16),
            top_k=values.integer("num_experts_per_tok", high=2**16),
            d_expert=values.integer("intermediate_size"),
            n_shared_experts=1,
            score_func="sigmoid",
            norm_top_k=False,
            weight_on="input",
            global_aux_loss_coef=values.coefficient("router_aux_loss_coef"),
        ),
    )


def _layer(model: ModelConfig, layer: int, layout: Layout) -> Iterator[HfTensor]:
    yield from gqa_tensors(model, layer)
    theirs, ours = f"model.layers.{layer}.feed_forward.", f"layers.{layer}.ffn."
    if not model.is_moe(layer):
        yield from swiglu_tensors(theirs, ours, model.d_ff, model.d_model)
        return
    shape = model.moe.n_experts, model.d_model
    yield plain(f"{theirs}router.weight", f"{ours}router.weight", *shape)
    shared = f"{theirs}shared_expert.", f"{ours}shared_experts."
    yield from swiglu_tensors(*shared, model.moe.d_expert, model.d_model)
    experts = f"{theirs}experts.", f"{ours}experts."
    yield from expert_tensors(model, *experts, layout, fused="halves")


LLAMA4 = Family("Llama4ForCausalLM", _refusals, _config, _parse, _layer, "fused")
