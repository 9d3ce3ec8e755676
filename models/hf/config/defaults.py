"""The defaults of transformers for missing keys of config.json, and the types of the other keys.

A missing key does not mean "none": Mistral then has a window of 4,096 tokens, GPT-OSS the RoPE
scaling of its publication. The numbers are those of the configuration classes of transformers 5.23;
`tests/models/hf/test_hf_defaults.py` compares them with the installed ones.
"""

from typing import Any, NamedTuple


class OrNull(NamedTuple):
    """A default of a key for which null is also valid, mostly as "derive it"."""

    default: Any


MODEL_TYPES = {
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Glm4MoeForCausalLM": "glm4_moe",
    "MixtralForCausalLM": "mixtral",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "GptOssForCausalLM": "gpt_oss",
    "Llama4ForCausalLM": "llama4_text",
    "Llama4ForConditionalGeneration": "llama4",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen3ForCausalLM": "qwen3",
}
"""`model_type` of an architecture: transformers selects by this key, vLLM by the other."""
_COMMON = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
    "rope_parameters": OrNull(None),
}
_UNBIASED = _COMMON | {"attention_bias": False}
DEFAULTS: dict[str, dict[str, Any]] = {
    "Qwen3MoeForCausalLM": _UNBIASED | {
        "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768,
        "use_sliding_window": False, "sliding_window": OrNull(4096), "decoder_sparse_step": 1,
        "mlp_only_layers": OrNull(None), "norm_topk_prob": False, "router_aux_loss_coef": 0.001,
    },
    "Glm4MoeForCausalLM": _UNBIASED | {
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
        "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
        "norm_topk_prob": True, "use_qk_norm": False, "partial_rotary_factor": 0.5,
        "first_k_dense_replace": 1,
    },
    "MixtralForCausalLM": _COMMON | {
        "rope_theta": 1000000.0, "num_key_value_heads": 8, "head_dim": OrNull(None),
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "sliding_window": OrNull(None),
        "router_aux_loss_coef": 0.001,
    },
    "DeepseekV3ForCausalLM": _UNBIASED | {
        "num_key_value_heads": OrNull(128), "rms_norm_eps": 1e-6, "max_position_embeddings": 4096,
        "q_lora_rank": OrNull(1536), "n_shared_experts": 1, "n_group": 8, "topk_group": 4,
        "routed_scaling_factor": 2.5, "norm_topk_prob": True, "rope_interleave": True,
        "first_k_dense_replace": 3,
    },
    "DeepseekV2ForCausalLM": _UNBIASED | {
        "num_key_value_heads": OrNull(None), "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
        "q_lora_rank": OrNull(1536), "n_shared_experts": 2, "n_group": OrNull(None),
        "topk_group": OrNull(None), "routed_scaling_factor": 1.0, "norm_topk_prob": False,
        "topk_method": "greedy", "first_k_dense_replace": 0, "mlp_bias": False,
        "head_dim": OrNull(None),
    },
    "GptOssForCausalLM": _COMMON | {
        "attention_bias": True, "rope_theta": 150000.0, "num_key_value_heads": 8, "head_dim": 64,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "sliding_window": OrNull(128),
        "layer_types": OrNull(None), "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
        "router_aux_loss_coef": 0.001,
    },
    "Llama4ForCausalLM": _UNBIASED | {
        "rope_theta": 500000.0, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "no_rope_layer_interval": 4,
        "no_rope_layers": OrNull(None), "layer_types": OrNull(None), "moe_layers": OrNull(None),
        "interleave_moe_layer_step": 1, "attention_chunk_size": OrNull(8192), "use_qk_norm": True,
        "attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1,
        "router_aux_loss_coef": 0.001,
    },
    "LlamaForCausalLM": _UNBIASED | {
        "num_key_value_heads": OrNull(None), "head_dim": OrNull(None), "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048, "mlp_bias": False,
    },
    "MistralForCausalLM": _COMMON | {
        "num_key_value_heads": 8, "head_dim": OrNull(None), "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072, "sliding_window": OrNull(4096),
    },
    "Qwen3ForCausalLM": _UNBIASED | {
        "num_key_value_heads": OrNull(32), "head_dim": 128, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768, "use_sliding_window": False,
        "sliding_window": OrNull(4096), "layer_types": OrNull(None),
    },
}  # fmt: skip
"""By architecture. Keys that determine the shape of a matrix have no default: config.json must
contain them."""
STRETCHED = {
    "GptOssForCausalLM": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 4096,
    },
}  # fmt: skip
"""`rope_parameters` of an architecture whose config.json has neither these nor `rope_scaling`."""
UNUSED: dict[str, tuple[type, ...]] = {
    "use_cache": (bool,),
    "output_router_logits": (bool,),
    "router_jitter_noise": (float, int),
    "attention_dropout": (float, int),
    "max_position_embeddings": (int,),
    "pad_token_id": (int, type(None)),
    "bos_token_id": (int, type(None)),
    "eos_token_id": (int, list, type(None)),
    "pretraining_tp": (int, type(None)),
    "transformers_version": (str, type(None)),
    "output_hidden_states": (bool, type(None)),
    "return_dict": (bool, type(None)),
    "chunk_size_feed_forward": (int,),
    "max_window_layers": (int,),
    "is_encoder_decoder": (bool,),
    "id2label": (dict, type(None)),
    "label2id": (dict, type(None)),
}
"""Keys that do not change what the network computes, and their types."""
DTYPES = ("float64", "float32", "float16", "bfloat16")
"""Valid values of `dtype` and `torch_dtype`."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""The number of experts, in the spellings of different architectures."""
