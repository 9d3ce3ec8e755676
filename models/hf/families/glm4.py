"""GLM-4 MoE: GQA, sigmoid scores with a balancing bias, expert groups, shared experts."""

from collections.abc import Iterator
from typing import Any

from configs.errors import UserError
from configs.model import ModelConfig, MoEConfig
from models.hf.config.config_reader import Family, HFConfigReader, clashes, plain_gqa_clashes
from models.hf.config.rope import rope_of, rope_parameters
from models.hf.families.qwen3 import common_sizes, gqa_of, only_full_attention
from models.hf.tensors import (
    HfTensor,
    Layout,
    deepseek_moe_tensors,
    gqa_tensors,
    prefix,
    swiglu_tensors,
)


def _refusals(model: ModelConfig) -> list[str]:
    a, moe = model.attention, model.moe
    return plain_gqa_clashes(model) + clashes(
        attention__qk_norm=a.qk_norm == "l2",
        moe__score_func=moe.score_func != "sigmoid",
        # a group's score is the sum of its two best
        moe__n_experts=moe.n_experts < 2 * moe.n_groups,
    )


def _config(model: ModelConfig) -> dict[str, Any]:
    rope = rope_parameters(model.rope) | {"partial_rotary_factor": 1.0}  # its default is 0.5
    return deepseek_moe_config(model) | {
        "model_type": "glm4_moe",
        "rope_parameters": rope,
        "use_qk_norm": model.attention.qk_norm == "rms",
        "partial_rotary_factor": 1.0,
    }


def _parse(values: HFConfigReader) -> ModelConfig:
    only_full_attention(values)
    dense = values.integer("first_k_dense_replace", low=0, high=10_000)
    return ModelConfig(
        **common_sizes(values),
        attention=gqa_of(values, qk_norm="rms" if values.flag("use_qk_norm") else "none"),
        rope=rope_of(values, interleaved=False),
        n_dense_layers=dense,
        d_ff=values.integer("intermediate_size") if dense else 0,
        mtp_depth=mtp_depth_of(values),
        moe=sigmoid_moe_of(values),
    )


def _layer(model: ModelConfig, layer: int, layout: Layout) -> Iterator[HfTensor]:
    yield from gqa_tensors(model, layer)
    if model.is_moe(layer):
        yield from deepseek_moe_tensors(model, layer, layout)
    else:
        names = f"model.layers.{layer}.mlp.", f"{prefix(model, layer)}ffn."
        yield from swiglu_tensors(*names, model.d_ff, model.d_model)


def deepseek_moe_config(model: ModelConfig) -> dict[str, Any]:
    """The experts in DeepSeek's keys."""
    moe = model.moe
    return {
        "n_routed_experts": moe.n_experts,
        "num_local_experts": moe.n_experts,
        "n_shared_experts": max(moe.n_shared_experts, 1),
        "intermediate_size": model.d_ff if model.n_dense_layers else moe.d_expert,
        "moe_intermediate_size": moe.d_expert,
        "n_group": moe.n_groups,
        "topk_group": moe.top_groups,
        "norm_topk_prob": moe.norm_top_k,
        "routed_scaling_factor": moe.route_scale,
        "first_k_dense_replace": model.n_dense_layers,
        "aux_loss_alpha": moe.seq_aux_loss_coef,
        "seq_aux": True,
        "num_nextn_predict_layers": model.mtp_depth,
    }


def mtp_depth_of(values: HFConfigReader) -> int:
    """The number of MTP modules after the layers."""
    key, also = "num_nextn_predict_layers", "num_mtp_layers"
    given = key in values.raw or also in values.raw
    return values.integer(key, also, low=0, high=16) if given else 0


def sigmoid_moe_of(values: HFConfigReader) -> MoEConfig:
    """Experts with sigmoid scores and a balancing bias, from DeepSeek's keys."""
    n_experts = values.integer("n_routed_experts", "num_local_experts", high=2**16)
    n_groups = values.integer("n_group", high=2**16)
    if n_experts < 2 * n_groups:  # a group's score is the sum of its two best
        raise UserError(
            f"{values.place}: n_group = {n_groups} (the default, where it is left out): "
            f"n_routed_experts = {n_experts} must be at least two for each group"
        )
    return MoEConfig(
        n_experts=n_experts,
        top_k=values.integer("num_experts_per_tok", high=2**16),
        d_expert=values.integer("moe_intermediate_size"),
        n_shared_experts=values.integer("n_shared_experts", high=2**10),
        score_func="sigmoid",
        n_groups=n_groups,
        top_groups=values.integer("topk_group", high=2**16),
        norm_top_k=values.flag("norm_topk_prob"),
        route_scale=values.number("routed_scaling_factor", high=1e6),
        seq_aux_loss_coef=values.coefficient("aux_loss_alpha"),
        bias_update_rate=1e-3,  # training continues as in DeepSeek-V3, unless configured otherwise
    )


GLM4 = Family("Glm4MoeForCausalLM", _refusals, _config, _parse, _layer, "per_expert", has_mtp=True)
