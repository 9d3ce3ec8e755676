"""Seeded random models with mostly odd sizes: any model that the schema accepts, or models of one
family."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from configs.errors import UserError
from configs.model import AttentionConfig, ModelConfig, MoEConfig, RopeConfig


def random_models(seeds: Iterable[int]) -> Iterator[ModelConfig]:
    """One model per seed; most settings of every section are varied together."""
    for seed in seeds:
        yield _model(random.Random(seed))


def family_model(family: str, seed: int) -> ModelConfig:
    """A random model with the features of `family`, one of `FEATURES`."""
    rng = random.Random(f"{family} {seed}")
    model, kind = _model(rng), FEATURES[family]
    attention = {"kind": kind.get("kind", "gqa")} | _widths(rng, kind.get("kind", "gqa"))
    attention |= {"n_heads": model.attention.n_heads} | {
        key: _pick(rng, value) for key, value in kind.get("attention", {}).items()
    }
    if attention.get("local", "none") != "none":
        attention |= {"local_size": rng.randint(1, 9), "full_every": rng.choice([1, 2, 3])}
    moe = {key: _pick(rng, value) for key, value in (_PLAIN_MOE | kind["moe"]).items()}
    scales: dict[str, Any] = (
        {} if kind.get("kind") == "mla" else {"mscale": 0.0, "mscale_all_dim": 0.0}
    )
    changed = {key: _pick(rng, value) for key, value in kind.get("model", {}).items()}
    return replace(
        model,
        **{"moe_every": 1, "mtp_depth": 0} | changed,
        attention=AttentionConfig(**attention),
        rope=replace(model.rope, interleaved=_pick(rng, kind.get("interleaved", False)), **scales),
        moe=replace(model.moe, **moe),
    )


def _pick(rng: random.Random, value: Any) -> Any:
    return rng.choice(value) if isinstance(value, list) else value


_PLAIN_MOE = {"router_bias": False, "expert_bias": False, "activation": "swiglu",
              "weight_on": "output"}  # fmt: skip
_SOFTMAX = {"score_func": "softmax", "n_groups": 1, "top_groups": 1, "bias_update_rate": 0.0,
            "n_shared_experts": 0, "route_scale": 1.0}  # fmt: skip
FEATURES: dict[str, dict[str, Any]] = {
    "qwen3": {"attention": {"qk_norm": "rms"}, "moe": _SOFTMAX},
    "mixtral": {"moe": _SOFTMAX | {"norm_top_k": True}, "model": {"n_dense_layers": 0}},
    "glm4": {
        "attention": {"qk_norm": ["none", "rms"]}, "moe": {"score_func": "sigmoid"},
        "model": {"mtp_depth": [0, 1]},
    },
    "deepseek_v3": {
        "kind": "mla", "moe": {"score_func": "sigmoid"}, "interleaved": [True, False],
        "model": {"mtp_depth": [0, 1]},
    },
    "deepseek_v2": {
        "kind": "mla", "interleaved": True,
        "moe": {"score_func": "softmax", "norm_top_k": False, "bias_update_rate": 0.0},
    },
    "gpt_oss": {
        "attention": {"bias": True, "sinks": True, "local": ["none", "window"]},
        "moe": _SOFTMAX | {"norm_top_k": True, "router_bias": True, "expert_bias": True,
                           "activation": "clamped_swiglu"},
        "model": {"n_dense_layers": 0},
    },
    "llama4": {
        "attention": {"qk_norm": ["l2", "none"], "local": "chunk", "rope_on_full": False,
                      "temperature_floor": [0, 5]},
        "moe": {"weight_on": "input", "score_func": "sigmoid", "norm_top_k": False, "n_groups": 1,
                "top_groups": 1, "bias_update_rate": 0.0, "n_shared_experts": 1,
                "route_scale": 1.0},
        "interleaved": True, "model": {"n_dense_layers": 0, "moe_every": [1, 2]},
    },
}  # fmt: skip


def _model(rng: random.Random) -> ModelConfig:
    while True:
        try:
            n_layers = rng.randint(1, 4)
            return ModelConfig(
                vocab_size=rng.randint(1, 40),
                d_model=rng.randint(1, 17),
                n_layers=n_layers,
                n_dense_layers=rng.choice([0, 0, 0, 1, n_layers]),
                moe_every=rng.choice([1, 1, 2, 3]),
                d_ff=rng.randint(1, 11),
                norm_eps=rng.choice([1e-6, 1e-5]),
                tie_embeddings=rng.random() < 0.5,
                mtp_depth=rng.choice([0, 0, 1, 2]),
                attention=AttentionConfig(**_attention(rng)),
                rope=RopeConfig(**_rope(rng)),
                moe=MoEConfig(**_moe(rng)),
            )
        except UserError:
            continue


def _widths(rng: random.Random, kind: str) -> dict[str, Any]:
    if kind == "gqa":
        return {"head_dim": 2 * rng.randint(1, 6)}
    return {
        "q_lora_rank": rng.choice([0, 0, 1, 3, 8]),
        "kv_lora_rank": rng.choice([1, 3, 5, 8]),
        "qk_nope_head_dim": rng.randint(1, 9),
        "qk_rope_head_dim": 2 * rng.randint(1, 4),
        "v_head_dim": rng.randint(1, 9),
    }


def _attention(rng: random.Random) -> dict[str, Any]:
    kind, n_heads = rng.choice(["gqa", "gqa", "mla"]), rng.randint(1, 5)
    found = {"kind": kind, "n_heads": n_heads, "full_every": rng.choice([1, 2, 3, 7])}
    found |= _widths(rng, kind)
    local = rng.choice(["none", "none", "window", "chunk"])
    if local != "none":
        found |= {"local": local, "local_size": rng.randint(1, 9)}
    if kind == "gqa":
        divisors = [n for n in range(1, n_heads + 1) if n_heads % n == 0]
        found |= {
            "n_kv_heads": rng.choice([0, *divisors]),
            "qk_norm": rng.choice(["none", "rms", "l2"]),
            "bias": rng.random() < 0.3,
            "sinks": rng.random() < 0.3,
            "rope_on_full": rng.random() < 0.6,
            "temperature_floor": rng.choice([0, 0, 1, 7]),
        }
    return found


def _rope(rng: random.Random) -> dict[str, Any]:
    scaling = rng.choice(["none", "none", "yarn", "llama3"])
    found = {
        "theta": rng.choice([1.5, 10000.0, 500000.0, 1e12]),
        "interleaved": rng.random() < 0.5,
        "scaling": scaling,
    }
    if scaling != "none":
        length = rng.choice([1, 3, 16, 4096])
        found |= {"factor": rng.choice([1.0, 4.0, 32.0]), "original_length": length}
    low = rng.choice([0.5, 1.0, 2.0])
    if scaling == "yarn":
        scales = rng.choice([(0.0, 0.0), (1.0, 0.7), (1.0, 1.0)])
        found |= {"beta_slow": low, "beta_fast": low * rng.choice([1, 2, 32])}
        found |= {"truncate": rng.random() < 0.5, "mscale": scales[0], "mscale_all_dim": scales[1]}
    if scaling == "llama3":
        found |= {"low_freq_factor": low, "high_freq_factor": low * rng.choice([1, 4])}
    return found


def _moe(rng: random.Random) -> dict[str, Any]:
    n_groups, size = rng.choice([1, 1, 2, 3]), rng.randint(1, 4)
    top_groups = rng.randint(1, n_groups)
    return {
        "n_experts": n_groups * size,
        "n_groups": n_groups,
        "top_groups": top_groups,
        "top_k": rng.randint(1, top_groups * size),
        "d_expert": rng.randint(1, 13),
        "n_shared_experts": rng.choice([0, 0, 1, 2]),
        "score_func": rng.choice(["softmax", "sigmoid"]),
        "router_bias": rng.random() < 0.2,
        "weight_on": rng.choice(["output", "output", "input"]),
        "expert_bias": rng.random() < 0.2,
        "activation": rng.choice(["swiglu", "swiglu", "clamped_swiglu"]),
        "norm_top_k": rng.random() < 0.6,
        "route_scale": rng.choice([1.0, 1.0, 2.5]),
        "bias_update_rate": rng.choice([0.0, 0.0, 0.01]),
        "seq_aux_loss_coef": rng.choice([0.0, 0.01]),
        "global_aux_loss_coef": rng.choice([0.0, 0.01]),
        "router_z_loss_coef": rng.choice([0.0, 0.01]),
    }
