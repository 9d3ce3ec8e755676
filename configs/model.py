"""The model sections of an experiment: one decoder whose settings select the model family.

| family | settings that select it |
|---|---|
| Qwen3-MoE | qk_norm rms, softmax scores |
| GLM-4 MoE | qk_norm rms, sigmoid scores, balancing bias, shared experts |
| Mixtral | softmax scores, no qk_norm |
| DeepSeek-V3, V2 | mla, rope interleaved, sigmoid or softmax scores, expert groups |
| GPT-OSS | local window on every second layer, sinks, biases, clamped activation, yarn |
| Llama 4 | local chunk, every fourth layer full without RoPE, weights on the expert input |
"""

from dataclasses import dataclass, field
from typing import Literal

from configs.errors import ConfigError
from configs.rules import at_least, at_most, belongs_to, between


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    n_heads: int
    """Query heads."""
    kind: Literal["gqa", "mla"] = "gqa"
    """Grouped-query attention, or multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)."""
    n_kv_heads: int = 0
    """Key and value heads of gqa; divides `n_heads`. 0: as many as query heads."""
    head_dim: int = 0
    """Width of one gqa head; even, for RoPE."""
    q_lora_rank: int = 0
    """mla: width of the compressed queries. 0: queries are not compressed."""
    kv_lora_rank: int = 0
    """mla: width of the compressed keys and values."""
    qk_nope_head_dim: int = 0
    """mla: part of a query or key head without RoPE."""
    qk_rope_head_dim: int = 0
    """mla: part of a query or key head with RoPE, shared by all key heads; even."""
    v_head_dim: int = 0
    """mla: width of a value head."""
    qk_norm: Literal["none", "rms", "l2"] = "none"
    """gqa: normalize every query and key head. `rms`: with a weight, before RoPE (Qwen3). `l2`:
    without a weight, after RoPE, on layers that have RoPE (Llama 4)."""
    bias: bool = False
    """Biases on the query, key, value and output projections (GPT-OSS)."""
    sinks: bool = False
    """A learned logit per head that the softmax includes and that has no value (GPT-OSS)."""
    local: Literal["none", "window", "chunk"] = "none"
    """What a token attends to in a local layer: the last `local_size` tokens, or its chunk."""
    local_size: int = 0
    """Tokens of a window or chunk."""
    full_every: int = 1
    """Period of layers with full attention: layers full_every - 1, 2 * full_every - 1, ..."""
    rope_on_full: bool = True
    """Whether the full layers have RoPE (in Llama 4 they have none)."""
    temperature_floor: int = 0
    """Full layers without RoPE: scale queries by 1 + temperature_scale * ln(1 + floor((position +
    1) / temperature_floor)) (arXiv:2501.19399). 0: no scaling."""
    temperature_scale: float = 0.1
    """See `temperature_floor`."""

    def __post_init__(self) -> None:
        between(self, 1, 2**16, "n_heads", "full_every")
        between(self, 0, 2**24, "n_kv_heads", "local_size", *_WIDTHS)
        between(self, 0, 2**31, "temperature_floor")
        between(self, 0, 1000, "temperature_scale")
        if self.kind == "mla":
            belongs_to(self, "kind = gqa", *_GQA_ONLY)
            at_least(self, 1, *_WIDTHS[2:])
            value_width = self.qk_nope_head_dim + self.v_head_dim
            at_most(2**24, "wide keys and values", n_heads=self.n_heads, width=value_width)
        else:
            belongs_to(self, "kind = mla", *_WIDTHS[1:])
            at_least(self, 1, "head_dim")
            if self.n_kv_heads and self.n_heads % self.n_kv_heads:
                raise ConfigError(
                    f"n_kv_heads = {self.n_kv_heads}: must divide n_heads = {self.n_heads}"
                )
        at_most(2**24, "wide queries", n_heads=self.n_heads, width=self.qk_dim)
        if self.rope_dim % 2:
            key = "qk_rope_head_dim" if self.kind == "mla" else "head_dim"
            raise ConfigError(f"{key} = {self.rope_dim}: must be even for RoPE")
        if (self.local == "none") != (self.local_size == 0):
            raise ConfigError(
                f"local = {self.local} with local_size = {self.local_size}: "
                "a window or chunk needs its size, and only those do"
            )

    @property
    def kv_heads(self) -> int:
        """Key and value heads of the attention core."""
        return self.n_kv_heads or self.n_heads

    @property
    def qk_dim(self) -> int:
        """Width of a query or key head."""
        return self.head_dim or self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def value_dim(self) -> int:
        """Width of a value head."""
        return self.v_head_dim if self.kind == "mla" else self.head_dim

    @property
    def rope_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.qk_rope_head_dim if self.kind == "mla" else self.head_dim

    def is_full(self, layer: int) -> bool:
        """Whether tokens of layer `layer` (from 0) attend to all earlier tokens."""
        return self.local == "none" or (layer + 1) % self.full_every == 0

    def has_rope(self, layer: int) -> bool:
        """Whether layer `layer` rotates queries and keys."""
        return self.rope_on_full or (layer + 1) % self.full_every != 0


_WIDTHS = (
    "head_dim", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
"""The first is of gqa, the others are of mla, which requires all but `q_lora_rank`."""
_GQA_ONLY = (
    "n_kv_heads", "head_dim", "qk_norm", "bias", "sinks", "rope_on_full", "temperature_floor",
    "temperature_scale",
)  # fmt: skip
_YARN_BOUNDS = ("beta_fast", "beta_slow")
_YARN_SCALES = ("mscale", "mscale_all_dim")
_LLAMA3_BOUNDS = ("low_freq_factor", "high_freq_factor")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    theta: float = 10000.0
    """Base of the wavelengths, above 1."""
    interleaved: bool = False
    """Rotate neighboring dimensions (DeepSeek, Llama 4) instead of dimension i with i + half."""
    scaling: Literal["none", "yarn", "llama3"] = "none"
    """Extension to longer contexts: YaRN (arXiv:2309.00071) or Llama 3.1's rule."""
    factor: float = 1.0
    """Ratio of the extended context length to `original_length`."""
    original_length: int = 0
    """Context length before the extension, tokens."""
    beta_fast: float = 32.0
    """yarn: rotations over the original length above which a dimension is not scaled."""
    beta_slow: float = 1.0
    """yarn: rotations below which a dimension is scaled in full."""
    truncate: bool = True
    """yarn: round the two bounds to whole dimensions."""
    mscale: float = 0.0
    """yarn: weight of the logarithmic attention scale on cos and sin. If this and `mscale_all_dim`
    are 0, the weight is 1 (the paper)."""
    mscale_all_dim: float = 0.0
    """yarn: weight of the attention scale on the logits instead (DeepSeek)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_length divided by this are scaled in full."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_length divided by this are not scaled."""

    def __post_init__(self) -> None:
        if not 1 < self.theta <= 1e12:
            raise ConfigError(f"theta = {self.theta}: must be above 1 and at most 1e12")
        between(self, 1, 2**31, "factor")
        between(self, 0, 2**31, "original_length")
        between(self, 0, 1000, "mscale", "mscale_all_dim")
        between(self, 1e-6, 1e6, *_YARN_BOUNDS, *_LLAMA3_BOUNDS)
        if self.scaling == "none":
            belongs_to(self, "scaling = yarn or llama3", "factor", "original_length")
        elif not self.original_length:
            raise ConfigError(f"original_length = 0: scaling = {self.scaling} needs it")
        if self.scaling != "yarn":
            belongs_to(self, "scaling = yarn", *_YARN_BOUNDS, "truncate", *_YARN_SCALES)
        elif self.beta_slow > self.beta_fast:
            raise ConfigError(
                f"beta_slow = {self.beta_slow}: must not exceed beta_fast = {self.beta_fast}"
            )
        if self.scaling != "llama3":
            belongs_to(self, "scaling = llama3", *_LLAMA3_BOUNDS)
        elif self.low_freq_factor > self.high_freq_factor:
            raise ConfigError(
                f"low_freq_factor = {self.low_freq_factor}: must not exceed "
                f"high_freq_factor = {self.high_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    n_experts: int
    """Routed experts per MoE layer."""
    top_k: int
    """Routed experts per token."""
    d_expert: int
    """Hidden width of one expert (SwiGLU)."""
    n_shared_experts: int = 0
    """Experts that process every token, fused into one of width `n_shared_experts * d_expert`."""
    score_func: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become scores, in fp32. Exports with a balancing bias or shared experts
    need `sigmoid`."""
    n_groups: int = 1
    """Groups of consecutive experts; each token chooses `top_groups` of them first (node-limited
    routing). A group's score is the sum of its two best scores (sigmoid) or its best (softmax)."""
    top_groups: int = 1
    """Groups a token may choose from."""
    router_bias: bool = False
    """A learned bias on the router's logits (GPT-OSS)."""
    weight_on: Literal["output", "input"] = "output"
    """Whether routing weights multiply an expert's output or its input (Llama 4)."""
    expert_bias: bool = False
    """Biases on both expert projections (GPT-OSS)."""
    activation: Literal["swiglu", "clamped_swiglu"] = "swiglu"
    """`clamped_swiglu`: (up + 1) * gate * sigmoid(1.702 * gate), gate at most 7, up within +-7
    (GPT-OSS)."""
    norm_top_k: bool = True
    """Divide the chosen scores by their sum. With `top_k` 1 the result is always 1."""
    route_scale: float = 1.0
    """Factor on the routing weights after normalization."""
    bias_update_rate: float = 0.0
    """Step of the aux-loss-free balancing bias per optimizer step (arXiv:2408.15664). 0: the
    router has no bias."""
    seq_aux_loss_coef: float = 0.0
    """Factor of the sequence-wise balance loss (DeepSeek-V3, arXiv:2412.19437, eq. 17-20), of every
    MoE layer; the loss is 1 at perfect balance. 0: off."""
    global_aux_loss_coef: float = 0.0
    """Factor of the balance loss over the global batch (arXiv:2501.11873), of every MoE layer; the
    loss is 1 at perfect balance. 0: off."""
    router_z_loss_coef: float = 0.0
    """Factor of the router z-loss (ST-MoE, arXiv:2202.08906), of every MoE layer; it keeps the
    router's logits small. 0: off."""
    force_balance: bool = False
    """Benchmarks only: ignore the router's choice and assign tokens to experts round-robin."""

    def __post_init__(self) -> None:
        between(self, 1, 2**16, "n_experts", "top_k", "n_groups")
        between(self, 1, 2**24, "d_expert")
        between(self, 1e-9, 1e9, "route_scale")
        between(self, 0, 2**10, "n_shared_experts")
        at_most(2**24, "wide", n_shared_experts=self.n_shared_experts, d_expert=self.d_expert)
        between(self, 0, 1, "bias_update_rate")
        between(self, 0, 100, "seq_aux_loss_coef", "global_aux_loss_coef", "router_z_loss_coef")
        if self.n_experts % self.n_groups or not 1 <= self.top_groups <= self.n_groups:
            raise ConfigError(
                f"n_groups = {self.n_groups}, top_groups = {self.top_groups}: n_groups must divide "
                f"n_experts = {self.n_experts} and top_groups lie between 1 and n_groups"
            )
        reachable = self.n_experts // self.n_groups * self.top_groups
        if reachable < self.top_k <= self.n_experts:
            raise ConfigError(
                f"top_k = {self.top_k}: top_groups = {self.top_groups} leave {reachable} experts"
            )
        if self.top_k > self.n_experts:
            raise ConfigError(
                f"top_k = {self.top_k}: a token cannot visit more than n_experts = {self.n_experts}"
            )

    @property
    def router_learns(self) -> bool:
        """Whether routing weights depend on the scores, so that the loss has a gradient for the
        router. One score divided by itself does not; with one expert there is no choice."""
        return not (self.top_k == 1 and self.norm_top_k and self.n_experts > 1)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    vocab_size: int
    """Rows of the embedding. A tokenizer trained for the run has exactly this many tokens."""
    d_model: int
    """Width of the residual stream."""
    n_layers: int
    """Transformer blocks."""
    attention: AttentionConfig
    moe: MoEConfig
    rope: RopeConfig = field(default_factory=RopeConfig)
    n_dense_layers: int = 0
    """Number of first layers with a dense feed-forward instead of experts."""
    moe_every: int = 1
    """Period of layers with experts, the others are dense (Llama 4 Maverick: 2)."""
    d_ff: int = 0
    """Hidden width of the dense feed-forward (only if there are dense layers)."""
    norm_eps: float = 1e-6
    """Epsilon of RMSNorm."""
    tie_embeddings: bool = True
    """Use the embedding as output head."""
    mtp_depth: int = 0
    """Modules of multi-token prediction, used in training only: module k predicts the (k+1)-th next
    token (DeepSeek-V3, arXiv:2412.19437, section 2.2) with a block like the last layer. 0: none."""
    init_std: float = 0.02
    """Standard deviation of the initial weights, for output projections divided by
    sqrt(2 * n_layers) (GPT-2)."""

    def __post_init__(self) -> None:
        between(self, 1, 2**24, "vocab_size", "d_model")
        between(self, 1, 10_000, "n_layers", "moe_every")
        between(self, 0, 2**24, "d_ff")
        between(self, 1e-9, 100, "init_std")
        between(self, 0, 1, "norm_eps")
        between(self, 0, self.n_layers, "n_dense_layers")
        between(self, 0, 16, "mtp_depth")
        if not self.d_ff and not all(map(self.is_moe, range(self.n_layers))):
            raise ConfigError("d_ff = 0: dense layers (n_dense_layers, moe_every) need their width")
        if self.n_parameters > _MOST_PARAMETERS:
            raise ConfigError(
                f"n_layers = {self.n_layers}: with d_model = {self.d_model}, "
                f"{self.moe.n_experts} experts and {self.vocab_size} tokens the model has "
                f"{self.n_parameters:.1e} parameters, more than {_MOST_PARAMETERS:.0e}; use "
                "smaller sizes"
            )

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) has experts; MTP modules have the type of the last
        layer."""
        layer = min(layer, self.n_layers - 1)
        return layer >= self.n_dense_layers and (layer + 1) % self.moe_every == 0

    @property
    def n_parameters(self) -> int:
        """Elements of all matrices, MTP modules included. Norms, biases and sinks are left out, so
        that this is fast and needs no torch (`models.counts` has the exact numbers)."""
        a, moe, width = self.attention, self.moe, self.d_model
        value_out = a.n_heads * a.value_dim
        if a.kind == "mla":
            queries = a.n_heads * a.qk_dim * (a.q_lora_rank or width) + a.q_lora_rank * width
            shared = a.kv_lora_rank + a.qk_rope_head_dim
            keys_values = a.n_heads * (a.qk_nope_head_dim + a.v_head_dim) * a.kv_lora_rank
            attention = queries + shared * width + keys_values + value_out * width
        else:
            attention = (a.n_heads + 2 * a.kv_heads) * a.head_dim * width + value_out * width
        experts = 3 * (moe.n_experts + moe.n_shared_experts) * moe.d_expert + moe.n_experts
        blocks = range(self.n_layers + self.mtp_depth)
        n_moe = sum(map(self.is_moe, blocks))
        feed_forward = (n_moe * experts + (len(blocks) - n_moe) * 3 * self.d_ff) * width
        outer = self.vocab_size * width * (1 if self.tie_embeddings else 2)
        return outer + len(blocks) * attention + feed_forward + 2 * self.mtp_depth * width**2


_MOST_PARAMETERS = 10**15
"""Above this number, sizes in bytes and FLOPs overflow torch's integers."""
