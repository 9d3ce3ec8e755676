"""Random models of every family: odd sizes, each optional feature on or off."""

from random import Random
from typing import Any

from configs.errors import UserError
from configs.model import AttentionConfig, ModelConfig, MoEConfig, RopeConfig

ARCHITECTURES = {
    "qwen3": "Qwen3MoeForCausalLM",
    "glm4": "Glm4MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "deepseek-v3": "DeepseekV3ForCausalLM",
    "deepseek-v2": "DeepseekV2ForCausalLM",
    "gpt-oss": "GptOssForCausalLM",
    "llama4": "Llama4ForCausalLM",
}


def random_model(family: str, rng: Random, vocab_size: int) -> ModelConfig:
    """A random model of the family that is valid under our own rules."""
    while True:
        try:
            return _draw(family, rng, vocab_size)
        except UserError:
            continue  # settings that exclude each other


def _draw(family: str, rng: Random, vocab_size: int) -> ModelConfig:
    n_layers = rng.randint(1, 5)
    mla = family.startswith("deepseek")
    attention = _mla(family, rng) if mla else _gqa(family, rng)
    d_model = rng.randint(8, 41)
    if family == "deepseek-v2":  # transformers needs a multiple, and views pairs as complex numbers
        d_model = attention.n_heads * rng.randint(2, 9)
    n_dense = 0 if family in ("mixtral", "gpt-oss", "llama4") else rng.randint(0, n_layers)
    moe_every = rng.randint(1, 3) if family == "llama4" else 1
    has_mtp = family in ("glm4", "deepseek-v3") and n_dense < n_layers
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        n_dense_layers=n_dense,
        moe_every=moe_every,
        d_ff=rng.randint(1, 39) if n_dense or moe_every > 1 else rng.choice([0, 17]),
        tie_embeddings=rng.random() < 0.5,
        norm_eps=rng.choice([1e-5, 1e-6, 3e-7]),
        init_std=rng.choice([0.02, 0.2]),
        mtp_depth=rng.randint(0, 2) if has_mtp else 0,
        attention=attention,
        rope=_rope(family, rng),
        moe=_moe(family, rng),
    )


def _gqa(family: str, rng: Random) -> AttentionConfig:
    n_heads = rng.choice([1, 2, 3, 4, 6])
    norms: dict[str, list[Any]] = {
        "qwen3": ["rms"],
        "glm4": ["rms", "none"],
        "llama4": ["l2", "none"],
    }
    more: dict[str, Any] = {}
    if family == "gpt-oss":
        more = {"bias": True, "sinks": True}
        if rng.random() < 0.8:
            more |= {"local": "window", "local_size": rng.randint(1, 9)}
    elif family == "llama4":
        more = {"local": "chunk", "local_size": rng.randint(1, 9), "rope_on_full": False}
        if rng.random() < 0.5:
            more |= {"temperature_floor": rng.randint(1, 9), "temperature_scale": 0.3}
    return AttentionConfig(
        n_heads=n_heads,
        n_kv_heads=rng.choice([0, *(n for n in range(1, n_heads + 1) if n_heads % n == 0)]),
        head_dim=rng.choice([2, 4, 6, 10, 16]),
        qk_norm=rng.choice(norms.get(family, ["none"])),
        full_every=rng.randint(1, 7),
        **more,
    )


def _mla(family: str, rng: Random) -> AttentionConfig:
    step = 2 if family == "deepseek-v2" else 1
    return AttentionConfig(
        kind="mla",
        n_heads=rng.randint(1, 5),
        q_lora_rank=rng.choice([0, step * rng.randint(1, 9)]),
        kv_lora_rank=step * rng.randint(1, 9),
        qk_nope_head_dim=step * rng.randint(1, 9),
        qk_rope_head_dim=2 * rng.randint(1, 5),
        v_head_dim=step * rng.randint(1, 9),
        full_every=rng.choice([1, 3]),
    )


def _rope(family: str, rng: Random) -> RopeConfig:
    interleaved = family in ("llama4", "deepseek-v2")
    if family == "deepseek-v3":
        interleaved = rng.random() < 0.5
    theta = rng.choice([10000.0, 500000.0, 12345.5])
    scaling = rng.choice(["none", "yarn", "llama3"])
    if scaling == "none":
        return RopeConfig(theta=theta, interleaved=interleaved)
    common: dict[str, Any] = {
        "theta": theta,
        "interleaved": interleaved,
        "factor": rng.choice([1.0, 2.0, 4.5]),
        "original_length": rng.randint(8, 30),
    }
    if scaling == "llama3":
        low, high = sorted([rng.choice([1.0, 1.5]), rng.choice([1.0, 4.0])])
        return RopeConfig(scaling="llama3", low_freq_factor=low, high_freq_factor=high, **common)
    if family.startswith("deepseek"):
        common["mscale"] = rng.choice([0.0, 0.7, 1.0])
        common["mscale_all_dim"] = rng.choice([0.0, 0.7, 1.3])
    return RopeConfig(
        scaling="yarn",
        beta_fast=rng.choice([32.0, 8.0]),
        beta_slow=rng.choice([1.0, 0.5]),
        truncate=rng.random() < 0.5,
        **common,
    )


def _moe(family: str, rng: Random) -> MoEConfig:
    n_experts = rng.randint(1, 7) * (1 if family not in ("glm4", "deepseek-v3") else 2)
    top_k = rng.randint(1, n_experts)
    more: dict[str, Any] = {
        "seq_aux_loss_coef": rng.choice([0.0, 1e-4]),
        "global_aux_loss_coef": rng.choice([0.0, 3e-3]),
        "router_z_loss_coef": rng.choice([0.0, 1e-3]),
    }
    if family in ("glm4", "deepseek-v3", "deepseek-v2"):
        least = 1 if family == "deepseek-v2" else 2
        n_groups = rng.choice([n for n in range(1, n_experts + 1) if n_experts % n == 0])
        n_groups = n_groups if n_experts // n_groups >= least else 1
        more |= {
            "n_shared_experts": rng.randint(0, 2),
            "n_groups": n_groups,
            "top_groups": rng.randint(1, n_groups),
            "route_scale": rng.choice([1.0, 2.5, 0.3]),
        }
    if family in ("glm4", "deepseek-v3"):
        more["score_func"] = "sigmoid"
        more["bias_update_rate"] = rng.choice([0.0, 0.001, 0.02])
    if family == "gpt-oss":
        more |= {"router_bias": True, "expert_bias": True, "activation": "clamped_swiglu"}
    if family == "llama4":
        more |= {"score_func": "sigmoid", "n_shared_experts": 1, "weight_on": "input"}
    free = family in ("qwen3", "glm4", "deepseek-v3")
    norm_top_k = rng.random() < 0.5 if free else family in ("mixtral", "gpt-oss")
    if norm_top_k:  # a single normalized score gives a router no gradient
        top_k = min(max(top_k, 2), n_experts)
    return MoEConfig(
        n_experts=n_experts,
        top_k=top_k,
        d_expert=rng.randint(1, 19),
        norm_top_k=norm_top_k,
        **more,
    )
