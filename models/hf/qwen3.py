"""Qwen3-MoE: GQA with QK-norm, softmax scores."""

from collections.abc import Iterator
from typing import Any

from configs.model import Attention, Model, Moe
from configs.rules import ConfigError
from models.hf.tensors import HfTensor, Layout, expert_tensors, gqa_tensors, plain, swiglu_tensors
from models.hf.values import (
    Family,
    Values,
    clashes,
    plain_gqa_clashes,
    plain_softmax_clashes,
)


def _refusals(model: Model) -> list[str]:
    common = plain_gqa_clashes(model) + plain_softmax_clashes(model)
    return common + clashes(attention__qk_norm=model.attention.qk_norm != "rms")


def _config(model: Model) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "num_experts": model.moe.n_experts,
        "num_local_experts": model.moe.n_experts,
        "intermediate_size": model.d_ff if model.n_dense_layers else model.moe.d_expert,
        "moe_intermediate_size": model.moe.d_expert,
        "norm_topk_prob": model.moe.norm_top_k,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(model.n_dense_layers)),
        "use_sliding_window": False,
        "sliding_window": None,
        "output_router_logits": False,
        "router_aux_loss_coef": model.moe.global_aux_loss_coef,
    }


def _parse(values: Values) -> Model:
    values.refuse("decoder_sparse_step", 1)
    values.refuse("use_sliding_window", False, None)
    dense = values.raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or dense != list(range(len(dense))):
        raise ConfigError(f"{values.place}: mlp_only_layers = {dense!r}: must be the first layers")
    return Model(
        **common_sizes(values),
        attention=gqa_of(values, qk_norm="rms"),
        rope=values.rope(interleaved=False),
        n_dense_layers=len(dense),
        d_ff=values.integer("intermediate_size") if dense else 0,
        moe=Moe(
            n_experts=values.integer("num_experts", "num_local_experts", high=2**16),
            top_k=values.integer("num_experts_per_tok", high=2**16),
            d_expert=values.integer("moe_intermediate_size"),
            norm_top_k=values.flag("norm_topk_prob"),
            global_aux_loss_coef=values.coefficient("router_aux_loss_coef"),
        ),
    )


def _layer(model: Model, layer: int, layout: Layout) -> Iterator[HfTensor]:
    yield from gqa_tensors(model, layer)
    theirs, ours, moe = f"model.layers.{layer}.mlp.", f"layers.{layer}.ffn.", model.moe
    if not model.is_moe(layer):
        yield from swiglu_tensors(theirs, ours, model.d_ff, model.d_model)
        return
    yield plain(f"{theirs}gate.weight", f"{ours}router.weight", moe.n_experts, model.d_model)
    yield from expert_tensors(model, f"{theirs}experts.", f"{ours}experts.", layout)


def common_sizes(values: Values) -> dict[str, Any]:
    """Keyword arguments of `Model` that every family spells alike."""
    return {
        "vocab_size": values.integer("vocab_size"),
        "d_model": values.integer("hidden_size"),
        "n_layers": values.integer("num_hidden_layers", high=10_000),
        "norm_eps": values.number("rms_norm_eps", high=1.0),
        "tie_embeddings": values.flag("tie_word_embeddings", default=False),
        "init_std": values.number("initializer_range", low=1e-9, high=100.0, default=0.02),
    }


def gqa_of(values: Values, **more: Any) -> Attention:
    """Grouped-query attention in the keys that most families share."""
    n_heads = values.integer("num_attention_heads")
    return Attention(
        n_heads=n_heads,
        n_kv_heads=values.integer("num_key_value_heads", default=n_heads),
        # Mixtral's published config leaves it out
        head_dim=values.integer("head_dim", default=values.integer("hidden_size") // n_heads),
        **more,
    )


QWEN3 = Family("Qwen3MoeForCausalLM", _refusals, _config, _parse, _layer, "per_expert")
