"""A small model of every family, with all features of its family."""

from dataclasses import replace

from configs.model import AttentionConfig, ModelConfig, MoEConfig, RopeConfig

QWEN3 = ModelConfig(
    vocab_size=96, d_model=32, n_layers=3, n_dense_layers=1, d_ff=40, tie_embeddings=False,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=16, qk_norm="rms"),
    moe=MoEConfig(n_experts=8, top_k=3, d_expert=24, global_aux_loss_coef=1e-3),
)  # fmt: skip
GLM4 = ModelConfig(
    vocab_size=96, d_model=32, n_layers=3, n_dense_layers=1, d_ff=40,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=10, qk_norm="rms"),
    moe=MoEConfig(n_experts=8, top_k=2, d_expert=12, n_shared_experts=2, score_func="sigmoid",
            n_groups=4, top_groups=2, route_scale=1.7, bias_update_rate=0.01),
)  # fmt: skip
GLM4_BARE = ModelConfig(
    vocab_size=96, d_model=32, n_layers=2, tie_embeddings=False,
    attention=AttentionConfig(n_heads=4, head_dim=8),
    moe=MoEConfig(n_experts=6, top_k=2, d_expert=12, score_func="sigmoid", norm_top_k=False),
)  # fmt: skip
MIXTRAL = ModelConfig(
    vocab_size=96, d_model=32, n_layers=2, tie_embeddings=False,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8),
    moe=MoEConfig(n_experts=5, top_k=2, d_expert=24, global_aux_loss_coef=0.02),
)  # fmt: skip
DEEPSEEK_V3 = ModelConfig(
    vocab_size=96, d_model=32, n_layers=3, n_dense_layers=1, d_ff=40, tie_embeddings=False,
    attention=AttentionConfig(kind="mla", n_heads=4, q_lora_rank=20, kv_lora_rank=14,
                        qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10),
    rope=RopeConfig(interleaved=True, scaling="yarn", factor=4.0, original_length=16, mscale=1.0,
              mscale_all_dim=0.8),
    moe=MoEConfig(n_experts=8, top_k=2, d_expert=12, n_shared_experts=1, score_func="sigmoid",
            n_groups=4, top_groups=2, route_scale=2.5, bias_update_rate=0.001,
            seq_aux_loss_coef=1e-4),
)  # fmt: skip
DEEPSEEK_V3_MTP = replace(DEEPSEEK_V3, mtp_depth=2)
GLM4_MTP = replace(GLM4, mtp_depth=1)
DEEPSEEK_V2 = ModelConfig(
    vocab_size=96, d_model=32, n_layers=2, n_dense_layers=1, d_ff=40, tie_embeddings=False,
    attention=AttentionConfig(kind="mla", n_heads=4, kv_lora_rank=14, qk_nope_head_dim=12,
                        qk_rope_head_dim=8, v_head_dim=10),
    rope=RopeConfig(interleaved=True, scaling="yarn", factor=4.0, original_length=16, mscale=0.707,
              mscale_all_dim=0.707),
    moe=MoEConfig(n_experts=8, top_k=3, d_expert=12, n_shared_experts=2, norm_top_k=False,
            n_groups=4, top_groups=2, route_scale=1.5, seq_aux_loss_coef=3e-3),
)  # fmt: skip
GPT_OSS = ModelConfig(
    vocab_size=96, d_model=32, n_layers=4, tie_embeddings=False,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8, bias=True, sinks=True,
                        local="window", local_size=7, full_every=2),
    rope=RopeConfig(theta=150000.0, scaling="yarn", factor=4.0, original_length=16, truncate=False),
    moe=MoEConfig(n_experts=6, top_k=2, d_expert=12, router_bias=True, expert_bias=True,
            activation="clamped_swiglu", global_aux_loss_coef=0.9),
)  # fmt: skip
LLAMA4 = ModelConfig(
    vocab_size=96, d_model=32, n_layers=4, moe_every=2, d_ff=40, tie_embeddings=False,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8, qk_norm="l2", local="chunk",
                        local_size=9, full_every=4, rope_on_full=False, temperature_floor=8),
    rope=RopeConfig(theta=500000.0, interleaved=True, scaling="llama3", factor=8.0,
                    original_length=16),
    moe=MoEConfig(n_experts=4, top_k=1, d_expert=24, n_shared_experts=1, score_func="sigmoid",
            norm_top_k=False, weight_on="input", global_aux_loss_coef=1e-3),
)  # fmt: skip

FAMILIES = {
    "qwen3": QWEN3,
    "glm4": GLM4,
    "glm4-bare": GLM4_BARE,
    "mixtral": MIXTRAL,
    "glm4-mtp": GLM4_MTP,
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek-v3-mtp": DEEPSEEK_V3_MTP,
    "deepseek-v2": DEEPSEEK_V2,
    "gpt-oss": GPT_OSS,
    "llama4": LLAMA4,
}
