"""Our parameters under Hugging Face names: one table that both directions read.

The features of a model choose the architecture that expresses them exactly:

| features | architecture |
|---|---|
| softmax scores, no balancing bias, no shared expert, QK-norm | `Qwen3MoeForCausalLM` |
| sigmoid scores, balancing bias or not, shared experts | `Glm4MoeForCausalLM` |

Every Hugging Face tensor is a slice of one of ours (`w13[e, 0]` is an expert's `gate_proj`), so
export reads slices, import writes them, and nothing is transposed or rounded on the way.
GLM always has a shared expert; where ours has none it is written as zeros, which add exactly zero.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from configs.schema import ConfigError, Model, Moe

QWEN3 = "Qwen3MoeForCausalLM"
GLM4 = "Glm4MoeForCausalLM"


@dataclass(frozen=True)
class HfTensor:
    """One tensor of the export: `ours[index]`, or zeros where `ours` is None."""

    name: str
    ours: str | None
    index: tuple[int, ...]
    shape: tuple[int, ...]
    keep_fp32: bool = False
    """Balancing biases stay fp32 in every export: rounding them changes the choice of experts."""


def architecture(model: Model) -> str:
    """The Hugging Face architecture that expresses `model`. ConfigError where none does."""
    moe = model.moe
    if moe.score_func == "sigmoid":
        return GLM4
    reasons = {
        "model.moe.bias_update_rate > 0": moe.bias_update_rate > 0,
        "model.moe.n_shared_experts > 0": moe.n_shared_experts > 0,
        "model.moe.route_scale != 1": moe.route_scale != 1.0,
        "model.qk_norm = false": not model.qk_norm,
    }
    clashes = [reason for reason, holds in reasons.items() if holds]
    if clashes:
        raise ConfigError(
            f"no Hugging Face architecture has softmax scores with {' and '.join(clashes)}; "
            "use model.moe.score_func = sigmoid, or leave that out"
        )
    return QWEN3


def hf_config(model: Model, *, max_positions: int, eos_token_id: int, dtype: str) -> dict[str, Any]:
    """The export's `config.json`.

    Old and new spellings stand side by side where readers disagree (`rope_theta` and
    `rope_parameters`, `num_experts` and `num_local_experts`).
    """
    moe, arch = model.moe, architecture(model)
    common: dict[str, Any] = {
        "architectures": [arch],
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.d_ff or moe.d_expert,
        "moe_intermediate_size": moe.d_expert,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.norm_top_k,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": model.init_std,
        "max_position_embeddings": max_positions,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if arch == QWEN3:
        return common | {
            "model_type": "qwen3_moe",
            "num_experts": moe.n_experts,
            "num_local_experts": moe.n_experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(range(model.n_dense_layers)),
            "rope_parameters": rope,
            "rope_scaling": None,
            "use_sliding_window": False,
            "sliding_window": None,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.0,
        }
    return common | {
        "model_type": "glm4_moe",
        "n_routed_experts": moe.n_experts,
        "n_shared_experts": max(moe.n_shared_experts, 1),
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": model.n_dense_layers,
        "routed_scaling_factor": moe.route_scale,
        "use_qk_norm": model.qk_norm,
        "partial_rotary_factor": 1.0,
        "rope_parameters": rope | {"partial_rotary_factor": 1.0},
        "rope_scaling": None,
        "num_nextn_predict_layers": 0,
    }


def from_hf_config(config: dict[str, Any], place: str) -> Model:
    """Our model for a `config.json` that `hf_config` could have written.

    place: what errors call the file. Raises ConfigError naming the key that is missing, has the
    wrong type or size, or asks for something this decoder does not have.
    """
    arch = config.get("architectures")
    arch = arch[0] if isinstance(arch, list) and arch else arch
    if arch not in (QWEN3, GLM4):
        raise ConfigError(f"{place}: architectures = {arch!r}: must be {QWEN3} or {GLM4}")
    for key, only in (("attention_bias", False), ("hidden_act", "silu"), ("rope_scaling", None)):
        _refuse(config, place, key, only)
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta")}
    if not isinstance(rope, dict):
        raise ConfigError(f"{place}: rope_parameters = {rope!r}: must be an object")
    _refuse(rope, f"{place}: rope_parameters", "rope_type", "default")

    def integer(key: str, low: int = 1, high: int = 2**24) -> int:
        return _number(config, key, place, int, low, high)

    if arch == QWEN3:
        moe, n_dense, qk_norm = _qwen3_moe(config, place, integer)
    else:
        _refuse(rope, f"{place}: rope_parameters", "partial_rotary_factor", 1.0)
        moe, n_dense, qk_norm = _glm4_moe(config, place, integer)
    try:
        return Model(
            vocab_size=integer("vocab_size"),
            d_model=integer("hidden_size"),
            n_layers=integer("num_hidden_layers", high=10_000),
            n_heads=integer("num_attention_heads"),
            n_kv_heads=integer("num_key_value_heads"),
            head_dim=integer("head_dim"),
            moe=moe,
            n_dense_layers=n_dense,
            d_ff=integer("intermediate_size") if n_dense else 0,
            qk_norm=qk_norm,
            rope_theta=_number(rope, "rope_theta", place, float, 1, 1e12),
            norm_eps=_number(config, "rms_norm_eps", place, float, 0, 1),
            tie_embeddings=_flag(config, "tie_word_embeddings", place),
        )
    except ConfigError as error:  # our own rules, in our names: say whose file broke them
        raise ConfigError(f"{place}: {str(error).removeprefix(f'{place}: ')}") from None


_Integer = Callable[..., int]


def _qwen3_moe(config: dict[str, Any], place: str, integer: _Integer) -> tuple[Moe, int, bool]:
    """The experts, the number of dense layers, and whether there is QK-norm."""
    _refuse(config, place, "decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or dense != list(range(len(dense))):
        raise ConfigError(f"{place}: mlp_only_layers = {dense!r}: must be the first layers")
    count = "num_experts" if "num_experts" in config else "num_local_experts"
    moe = Moe(
        n_experts=integer(count, high=2**16),
        top_k=integer("num_experts_per_tok", high=2**16),
        d_expert=integer("moe_intermediate_size"),
        norm_top_k=_flag(config, "norm_topk_prob", place),
        score_func="softmax",
    )
    return moe, len(dense), True


def _glm4_moe(config: dict[str, Any], place: str, integer: _Integer) -> tuple[Moe, int, bool]:
    """As `_qwen3_moe`."""
    _refuse(config, place, "n_group", 1)
    moe = Moe(
        n_experts=integer("n_routed_experts", high=2**16),
        top_k=integer("num_experts_per_tok", high=2**16),
        d_expert=integer("moe_intermediate_size"),
        norm_top_k=_flag(config, "norm_topk_prob", place),
        n_shared_experts=integer("n_shared_experts", high=2**10),
        score_func="sigmoid",
        route_scale=_number(config, "routed_scaling_factor", place, float, 0, 1e6),
        bias_update_rate=1e-3,  # trains on as DeepSeek-V3 did, unless told otherwise
    )
    dense = integer("first_k_dense_replace", low=0, high=10_000)
    return moe, dense, _flag(config, "use_qk_norm", place)


def _number(
    config: dict[str, Any], key: str, place: str, kind: type, low: float, high: float
) -> Any:
    """`config[key]` as `kind`, checked before anything of that size is made."""
    if key not in config:
        raise ConfigError(f"{place}: key {key!r} is missing")
    value = config[key]
    if type(value) is not int and not (kind is float and type(value) is float):
        wanted = "an integer" if kind is int else "a number"
        raise ConfigError(f"{place}: {key} = {value!r}: wrong type, must be {wanted}")
    if not low <= value <= high:
        raise ConfigError(f"{place}: {key} = {value!r}: must lie between {low} and {high}")
    return kind(value)


def _flag(config: dict[str, Any], key: str, place: str) -> bool:
    if type(config.get(key)) is not bool:
        raise ConfigError(f"{place}: {key} = {config.get(key)!r}: must be true or false")
    return bool(config[key])


def _refuse(config: dict[str, Any], place: str, key: str, only: Any) -> None:
    if config.get(key, only) != only:
        raise ConfigError(f"{place}: {key} = {config[key]!r}: only {only!r} is supported")


def hf_tensors(model: Model) -> Iterator[HfTensor]:
    """Every tensor of the export, layer by layer."""
    d_model, vocab = model.d_model, model.vocab_size
    yield HfTensor("model.embed_tokens.weight", "embed.weight", (), (vocab, d_model))
    for layer in range(model.n_layers):
        yield from _layer_tensors(model, layer)
    yield HfTensor("model.norm.weight", "norm.weight", (), (d_model,))
    if not model.tie_embeddings:
        yield HfTensor("lm_head.weight", "head.weight", (), (vocab, d_model))


def _layer_tensors(model: Model, layer: int) -> Iterator[HfTensor]:
    theirs, ours, d_model = f"model.layers.{layer}.", f"layers.{layer}.", model.d_model
    query, kv = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    plain: list[tuple[str, str, tuple[int, ...]]] = [
        ("input_layernorm", "attention_norm", (d_model,)),
        ("self_attn.q_proj", "attention.wq", (query, d_model)),
        ("self_attn.k_proj", "attention.wk", (kv, d_model)),
        ("self_attn.v_proj", "attention.wv", (kv, d_model)),
        ("self_attn.o_proj", "attention.wo", (d_model, query)),
        ("post_attention_layernorm", "ffn_norm", (d_model,)),
    ]
    if model.qk_norm:
        plain += [
            ("self_attn.q_norm", "attention.q_norm", (model.head_dim,)),
            ("self_attn.k_norm", "attention.k_norm", (model.head_dim,)),
        ]
    for their_name, our_name, shape in plain:
        yield HfTensor(f"{theirs}{their_name}.weight", f"{ours}{our_name}.weight", (), shape)
    if layer < model.n_dense_layers:
        yield from _swiglu_tensors(f"{theirs}mlp.", f"{ours}ffn.", (), model.d_ff, d_model)
    else:
        yield from _moe_tensors(model, f"{theirs}mlp.", f"{ours}ffn.")


def _moe_tensors(model: Model, theirs: str, ours: str) -> Iterator[HfTensor]:
    moe, d_model = model.moe, model.d_model
    router_shape = (moe.n_experts, d_model)
    yield HfTensor(f"{theirs}gate.weight", f"{ours}router.weight", (), router_shape)
    if architecture(model) == GLM4:
        yield HfTensor(
            f"{theirs}gate.e_score_correction_bias",
            f"{ours}router.bias_E",
            (),
            (moe.n_experts,),
            keep_fp32=True,
        )
        width = max(moe.n_shared_experts, 1) * moe.d_expert
        source = f"{ours}shared_experts." if moe.n_shared_experts else None
        yield from _swiglu_tensors(f"{theirs}shared_experts.", source, (), width, d_model)
    for e in range(moe.n_experts):
        yield from _swiglu_tensors(
            f"{theirs}experts.{e}.", f"{ours}experts.", (e,), moe.d_expert, d_model
        )


def _swiglu_tensors(
    theirs: str, ours: str | None, index: tuple[int, ...], width: int, d_model: int
) -> Iterator[HfTensor]:
    w13, w2 = (None, None) if ours is None else (f"{ours}w13", f"{ours}w2")
    yield HfTensor(f"{theirs}gate_proj.weight", w13, (*index, 0), (width, d_model))
    yield HfTensor(f"{theirs}up_proj.weight", w13, (*index, 1), (width, d_model))
    yield HfTensor(f"{theirs}down_proj.weight", w2, index, (d_model, width))
