"""Mixtral: GQA, softmax over the chosen logits."""

from collections.abc import Iterator
from typing import Any

from configs.model import ModelConfig, MoEConfig
from models.hf.config.config_reader import (
    Family,
    HFConfigReader,
    clashes,
    plain_gqa_clashes,
    plain_softmax_clashes,
)
from models.hf.config.rope import rope_of
from models.hf.families.qwen3 import common_sizes, gqa_of, only_full_attention
from models.hf.tensors import HfTensor, Layout, expert_tensors, gqa_tensors, plain


def _refusals(model: ModelConfig) -> list[str]:
    return (
        plain_gqa_clashes(model)
        + plain_softmax_clashes(model)
        + clashes(
            attention__qk_norm=model.attention.qk_norm != "none",
            n_dense_layers=model.n_dense_layers > 0,
            moe__norm_top_k=not model.moe.norm_top_k,
        )
    )


def _config(model: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "mixtral",
        "num_local_experts": model.moe.n_experts,
        "num_experts": model.moe.n_experts,
        "intermediate_size": model.moe.d_expert,
        "sliding_window": None,
        "output_router_logits": False,
        "router_aux_loss_coef": model.moe.global_aux_loss_coef,
    }


def _parse(values: HFConfigReader) -> ModelConfig:
    values.refuse("sliding_window", None)
    only_full_attention(values)
    return ModelConfig(
        **common_sizes(values),
        attention=gqa_of(values),
        rope=rope_of(values, interleaved=False),
        moe=MoEConfig(
            n_experts=values.integer("num_local_experts", "num_experts", high=2**16),
            top_k=values.integer("num_experts_per_tok", high=2**16),
            d_expert=values.integer("intermediate_size"),
            global_aux_loss_coef=values.coefficient("router_aux_loss_coef"),
        ),
    )


def _layer(model: ModelConfig, layer: int, layout: Layout) -> Iterator[HfTensor]:
    yield from gqa_tensors(model, layer)
    # transformers 5 names the block as in the other families once its experts are fused
    block = "mlp" if layout == "fused" else "block_sparse_moe"
    theirs, ours = f"model.layers.{layer}.{block}.", f"layers.{layer}.ffn."
    shape = model.moe.n_experts, model.d_model
    yield plain(f"{theirs}gate.weight", f"{ours}router.weight", *shape)
    experts = f"{theirs}experts.", f"{ours}experts."
    yield from expert_tensors(model, *experts, layout, names=("w1", "w3", "w2"))


MIXTRAL = Family("MixtralForCausalLM", _refusals, _config, _parse, _layer, "per_expert")
