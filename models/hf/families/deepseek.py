"""DeepSeek-V3 and V2: multi-head latent attention; sigmoid or softmax scores, expert groups."""

from collections.abc import Iterator
from typing import Any

from configs.errors import UserError
from configs.model import AttentionConfig, ModelConfig, MoEConfig
from models.hf.config.config_reader import Family, HFConfigReader, clashes
from models.hf.config.rope import rope_of
from models.hf.families.glm4 import deepseek_moe_config, mtp_depth_of, sigmoid_moe_of
from models.hf.families.qwen3 import common_sizes, only_full_attention
from models.hf.tensors import (
    HfTensor,
    Layout,
    deepseek_moe_tensors,
    plain,
    prefix,
    swiglu_tensors,
)


def _common_refusals(model: ModelConfig) -> list[str]:
    a, moe = model.attention, model.moe
    return clashes(
        attention__kind=a.kind != "mla",
        attention__local=a.local != "none",
        attention__rope_on_full=not a.rope_on_full,
        moe_every=model.moe_every > 1,
        moe__router_bias=moe.router_bias,
        moe__expert_bias=moe.expert_bias,
        moe__activation=moe.activation != "swiglu",
        moe__weight_on=moe.weight_on != "output",
    )


def _v3_refusals(model: ModelConfig) -> list[str]:
    moe = model.moe
    return _common_refusals(model) + clashes(
        moe__score_func=moe.score_func != "sigmoid",
        # a group's score is the sum of its two best
        moe__n_experts=moe.n_experts < 2 * moe.n_groups,
    )


def _v2_refusals(model: ModelConfig) -> list[str]:
    moe = model.moe
    return _common_refusals(model) + clashes(
        rope__interleaved=not model.rope.interleaved,
        moe__score_func=moe.score_func != "softmax",
        moe__norm_top_k=moe.norm_top_k,
        moe__bias_update_rate=moe.bias_update_rate > 0,
    )


def _v2_unloadable(model: ModelConfig) -> list[str]:
    """Sizes that transformers' own code of this family does not support, and why: it rejects the
    config, or fails in the first forward pass, where it views halves of a row as complex
    numbers."""
    a, found = model.attention, []
    if model.d_model % a.n_heads:
        found.append(f"d_model (a multiple of attention.n_heads = {a.n_heads})")
    for key in ("qk_nope_head_dim", "kv_lora_rank"):
        if getattr(a, key) % 2:
            found.append(f"attention.{key} (an even one)")
    return found


def _config(model: ModelConfig) -> dict[str, Any]:
    a = model.attention
    return deepseek_moe_config(model) | {
        "num_key_value_heads": a.n_heads,
        "head_dim": a.qk_rope_head_dim,  # read by the rotary embedding
        "q_lora_rank": a.q_lora_rank or None,
        "kv_lora_rank": a.kv_lora_rank,
        "qk_nope_head_dim": a.qk_nope_head_dim,
        "qk_rope_head_dim": a.qk_rope_head_dim,
        "v_head_dim": a.v_head_dim,
        "moe_layer_freq": 1,
    }


def _v3_config(model: ModelConfig) -> dict[str, Any]:
    more = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    names = {"model_type": "deepseek_v3", "rope_interleave": model.rope.interleaved}
    return _config(model) | more | names


def _v2_config(model: ModelConfig) -> dict[str, Any]:
    grouped = model.moe.n_groups > 1
    return _config(model) | {
        "model_type": "deepseek_v2",
        "scoring_func": "softmax",
        "topk_method": "group_limited_greedy" if grouped else "greedy",
    }


def _model(values: HFConfigReader, moe: MoEConfig, interleaved: bool) -> ModelConfig:
    values.refuse("moe_layer_freq", 1)
    values.refuse("mlp_bias", False)
    only_full_attention(values)
    dense = values.integer("first_k_dense_replace", low=0, high=10_000)
    n_heads = values.integer("num_attention_heads")
    rotated, rest = values.integer("qk_rope_head_dim"), values.integer("qk_nope_head_dim")
    for key, expected, same in (
        ("num_key_value_heads", n_heads, "num_attention_heads"),
        ("head_dim", rotated, "qk_rope_head_dim"),
        ("qk_head_dim", rotated + rest, "qk_nope_head_dim + qk_rope_head_dim"),
    ):
        given = values.integer_or_none(key)
        if given not in (None, expected):
            raise UserError(
                f"{values.place}: {key} = {given}, but {same} = {expected}: must be the same"
            )
    return ModelConfig(
        **common_sizes(values),
        attention=AttentionConfig(
            kind="mla",
            n_heads=n_heads,
            q_lora_rank=values.integer_or_none("q_lora_rank") or 0,
            kv_lora_rank=values.integer("kv_lora_rank"),
            qk_nope_head_dim=rest,
            qk_rope_head_dim=rotated,
            v_head_dim=values.integer("v_head_dim"),
        ),
        rope=rope_of(values, interleaved),
        n_dense_layers=dense,
        mtp_depth=mtp_depth_of(values),
        d_ff=values.integer("intermediate_size") if dense else 0,
        moe=moe,
    )


def _v3_parse(values: HFConfigReader) -> ModelConfig:
    values.refuse("scoring_func", "sigmoid")
    values.refuse("topk_method", "noaux_tc")
    return _model(values, sigmoid_moe_of(values), values.flag("rope_interleave"))


def _v2_parse(values: HFConfigReader) -> ModelConfig:
    values.refuse("scoring_func", "softmax")
    values.refuse("norm_topk_prob", False)
    values.refuse("topk_method", "greedy", "group_limited_greedy")
    grouped = values.get("topk_method") == "group_limited_greedy"
    for key in ("n_group", "topk_group"):  # read only if grouped
        values.integer_or_none(key, high=2**16)
    moe = MoEConfig(
        n_experts=values.integer("n_routed_experts", "num_experts", high=2**16),
        top_k=values.integer("num_experts_per_tok", high=2**16),
        d_expert=values.integer("moe_intermediate_size"),
        n_shared_experts=values.integer("n_shared_experts", high=2**10),
        n_groups=values.integer("n_group", high=2**16) if grouped else 1,
        top_groups=values.integer("topk_group", high=2**16) if grouped else 1,
        norm_top_k=False,
        route_scale=values.number("routed_scaling_factor", high=1e6),
        seq_aux_loss_coef=values.coefficient("aux_loss_alpha"),
    )
    return _model(values, moe, interleaved=True)


def _layer(model: ModelConfig, layer: int, layout: Layout) -> Iterator[HfTensor]:
    theirs, ours = f"model.layers.{layer}.", prefix(model, layer)
    a, d_model = model.attention, model.d_model
    query = a.n_heads * a.qk_dim
    rows: list[tuple[str, str, tuple[int, ...]]] = [
        ("input_layernorm", "attention_norm", (d_model,)),
        ("self_attn.kv_a_proj_with_mqa", "attention.wkv_a",
         (a.kv_lora_rank + a.qk_rope_head_dim, d_model)),
        ("self_attn.kv_a_layernorm", "attention.kv_a_norm", (a.kv_lora_rank,)),
        ("self_attn.kv_b_proj", "attention.wkv_b",
         (a.n_heads * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank)),
        ("self_attn.o_proj", "attention.wo", (d_model, a.n_heads * a.v_head_dim)),
        ("post_attention_layernorm", "ffn_norm", (d_model,)),
    ]  # fmt: skip
    if a.q_lora_rank:
        rows += [
            ("self_attn.q_a_proj", "attention.wq_a", (a.q_lora_rank, d_model)),
            ("self_attn.q_a_layernorm", "attention.q_a_norm", (a.q_lora_rank,)),
            ("self_attn.q_b_proj", "attention.wq", (query, a.q_lora_rank)),
        ]
    else:
        rows.append(("self_attn.q_proj", "attention.wq", (query, d_model)))
    for their_name, our_name, shape in rows:
        yield plain(f"{theirs}{their_name}.weight", f"{ours}{our_name}.weight", *shape)
    if model.is_moe(layer):
        yield from deepseek_moe_tensors(model, layer, layout)
    else:
        yield from swiglu_tensors(f"{theirs}mlp.", f"{ours}ffn.", model.d_ff, d_model)


_V3, _V2 = "DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM"
DEEPSEEK_V3 = Family(_V3, _v3_refusals, _v3_config, _v3_parse, _layer, "per_expert", has_mtp=True)
DEEPSEEK_V2 = Family(
    _V2, _v2_refusals, _v2_config, _v2_parse, _layer, "per_expert", unloadable=_v2_unloadable
)
