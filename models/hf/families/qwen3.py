"""Qwen3-MoE: GQA with QK-norm, softmax scores."""

from collections.abc import Iterator
from typing import Any

from configs.errors import UserError
from configs.model import AttentionConfig, ModelConfig, MoEConfig
from models.hf.config.config_reader import (
    Family,
    HFConfigReader,
    clashes,
    plain_gqa_clashes,
    plain_softmax_clashes,
)
from models.hf.config.rope import rope_of
from models.hf.messages import shown
from models.hf.tensors import HfTensor, Layout, expert_tensors, gqa_tensors, plain, swiglu_tensors


def _refusals(model: ModelConfig) -> list[str]:
    common = plain_gqa_clashes(model) + plain_softmax_clashes(model)
    return common + clashes(attention__qk_norm=model.attention.qk_norm != "rms")


def _config(model: ModelConfig) -> dict[str, Any]:
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


def _parse(values: HFConfigReader) -> ModelConfig:
    values.refuse("decoder_sparse_step", 1)
    values.refuse("use_sliding_window", False)
    values.integer_or_none("sliding_window", low=0)  # unused then
    only_full_attention(values)
    dense = values.listed("mlp_only_layers", int) or []
    if dense != list(range(len(dense))):
        raise UserError(
            f"{values.place}: mlp_only_layers = {shown(dense)}: must be the first layers"
        )
    return ModelConfig(
        **common_sizes(values),
        attention=gqa_of(values, qk_norm="rms"),
        rope=rope_of(values, interleaved=False),
        n_dense_layers=len(dense),
        d_ff=values.integer("intermediate_size") if dense else 0,
        moe=MoEConfig(
            n_experts=values.integer("num_experts", "num_local_experts", high=2**16),
            top_k=values.integer("num_experts_per_tok", high=2**16),
            d_expert=values.integer("moe_intermediate_size"),
            norm_top_k=values.flag("norm_topk_prob"),
            global_aux_loss_coef=values.coefficient("router_aux_loss_coef"),
        ),
    )


def _layer(model: ModelConfig, layer: int, layout: Layout) -> Iterator[HfTensor]:
    yield from gqa_tensors(model, layer)
    theirs, ours, moe = f"model.layers.{layer}.mlp.", f"layers.{layer}.ffn.", model.moe
    if not model.is_moe(layer):
        yield from swiglu_tensors(theirs, ours, model.d_ff, model.d_model)
        return
    yield plain(f"{theirs}gate.weight", f"{ours}router.weight", moe.n_experts, model.d_model)
    yield from expert_tensors(model, f"{theirs}experts.", f"{ours}experts.", layout)


def common_sizes(values: HFConfigReader) -> dict[str, Any]:
    """Keyword arguments of `Model` whose keys are the same in every family."""
    return {
        "vocab_size": values.integer("vocab_size"),
        "d_model": values.integer("hidden_size"),
        "n_layers": values.integer("num_hidden_layers", high=10_000),
        "norm_eps": values.number("rms_norm_eps", high=1.0),
        "tie_embeddings": values.flag("tie_word_embeddings"),
        "init_std": values.number("initializer_range", low=1e-9, high=100.0),
    }


def gqa_of(values: HFConfigReader, **more: Any) -> AttentionConfig:
    """Grouped-query attention from the keys that most families share."""
    n_heads, width = values.integer("num_attention_heads"), values.integer("hidden_size")
    head_dim = values.integer_or_none("head_dim")  # missing in Mixtral's published config
    kv_heads = values.integer_or_none("num_key_value_heads") or n_heads
    if n_heads % kv_heads:
        raise UserError(
            f"{values.place}: num_key_value_heads = {kv_heads} (the default, where it is left out) "
            f"must divide num_attention_heads = {n_heads}"
        )
    return AttentionConfig(
        n_heads=n_heads,
        n_kv_heads=kv_heads,
        head_dim=width // n_heads if head_dim is None else head_dim,
        **more,
    )


def only_full_attention(values: HFConfigReader) -> None:
    """Raise UserError if `layer_types` has windows for a family that supports none."""
    kinds = values.listed("layer_types", str) or []
    if any(kind != "full_attention" for kind in kinds):
        raise UserError(
            f"{values.place}: layer_types = {shown(kinds)}, but {values.architecture} has "
            "full_attention in every layer"
        )


QWEN3 = Family("Qwen3MoeForCausalLM", _refusals, _config, _parse, _layer, "per_expert")
