"""Small models for training in FP8, and their meshes."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from configs.model import AttentionConfig, ModelConfig, MoEConfig

GQA = ModelConfig(
    vocab_size=96, d_model=256, n_layers=2, n_dense_layers=1, d_ff=256,
    attention=AttentionConfig(n_heads=4, n_kv_heads=4, head_dim=64, qk_norm="rms"),
    moe=MoEConfig(n_experts=4, top_k=2, d_expert=256, n_shared_experts=1, score_func="sigmoid"),
)  # fmt: skip
"""Divisible by two everywhere, into parts of full blocks."""
MLA = replace(
    GQA,
    attention=AttentionConfig(kind="mla", n_heads=4, q_lora_rank=128, kv_lora_rank=128,
                        qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64),
)  # fmt: skip
ODD = ModelConfig(
    vocab_size=96, d_model=258, n_layers=2, n_dense_layers=1, d_ff=130,
    attention=AttentionConfig(n_heads=6, n_kv_heads=3, head_dim=42, bias=True),
    moe=MoEConfig(n_experts=6, top_k=2, d_expert=67, n_shared_experts=1),
)  # fmt: skip
"""No width is a multiple of the block size, and few are multiples of the number of ranks."""
BIASED = replace(
    GQA, moe=replace(GQA.moe, expert_bias=True, activation="clamped_swiglu", n_shared_experts=0)
)
MODELS = {"gqa": GQA, "mla": MLA, "odd": ODD, "biased": BIASED}


@dataclass(frozen=True)
class Case:
    """One of the models on a mesh."""

    model: str
    parallel: dict[str, Any] = field(default_factory=dict)
    fp8: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        told = [f"{key}={value}" for key, value in (self.parallel | self.fp8).items()]
        return " ".join([self.model, *told]).replace("/", "")

    def settings(self, ranks: int = 2) -> dict[str, Any]:
        """The experiment on this many ranks as nested tables; two microbatches per step, or one on
        more than four data ranks."""
        data_ranks = ranks // self.parallel.get("tp", 1)
        return {
            "run": {"dir": "unused"},
            "data": {"seq_len": 32},
            "model": asdict(MODELS[self.model]),
            "train": {"steps": 1, "global_batch": 8, "micro_batch": max(4 // data_ranks, 1)},
            "optimizer": {"lr": 1e-3},
            "parallel": self.parallel,
            "precision": {"recipe": "fp8_blockwise", "fp8": self.fp8},
        }


WEIGHTS = {
    1: [Case("odd"), Case("gqa", fp8={"power_of_two": True})],
    2: [
        Case("odd"), Case("odd", {"ep": 2}), Case("odd", {"dp_replicate": 2}),
        Case("mla", {"tp": 2, "ep": 2}, {"power_of_two": True}),
        Case("biased", {"tp": 2, "etp": 2}),
    ],
    4: [
        Case("odd", {"dp_replicate": 2, "ep": 2}, {"power_of_two": True}), Case("odd", {"ep": 1}),
        Case("odd", {"ep": 2}), Case("mla", {"tp": 2, "ep": 4}), Case("gqa", {"tp": 2, "etp": 2}),
        Case("gqa", {"tp": 2, "etp": 2, "ep": 1}),
    ],
}  # fmt: skip
"""By number of ranks."""
_WIRE = {"dispatch": {"dispatch_dtype": "fp8"}}
STEPS = {
    2: (
        Case("gqa", {"ep": 2}, {"first_bf16": 1}),
        Case("mla", {"tp": 2, "ep": 2}),
        Case("gqa", {"ep": 2, "dispatch": {"kind": "sync_free", "capacity_factor": 0.5}}),
    ),
    4: (Case("gqa", {"tp": 2, "ep": 4}), Case("mla", {"tp": 2, "etp": 2, "ep": 2})),
}
"""By number of ranks; trained with every one of `SAME`."""
SAME: tuple[dict[str, Any], ...] = (
    {}, {"recompute": "full"}, {"recompute": "selective"},
    {"recompute": "selective", "recompute_keep": ("exchange",), "recompute_every": 2},
    {"reshard_after_forward": False, "prefetch": 0}, {"zero_stage": 2},
)  # fmt: skip
"""Settings of `[parallel]` that must not change a bit."""
TOGETHER: tuple[dict[str, Any], ...] = (
    {}, {"recompute": "full", "zero_stage": 2},
    {"recompute": "selective", "recompute_keep": ("attention", "matmul", "exchange"),
     "reshard_after_forward": False, "prefetch": 0},
)  # fmt: skip
"""All of them in fewer runs, except `recompute_every`, which does not depend on the recipe."""
LAYERS = {
    1: [Case("gqa"), Case("mla", fp8={"power_of_two": True}), Case("odd"), Case("biased")],
    2: [
        Case("mla", {"tp": 2, "etp": 2}, {"power_of_two": True}),
        Case("gqa", {"ep": 2} | _WIRE, {"power_of_two": True}),
        Case("biased", {"tp": 2, "ep": 2}), Case("odd", {"ep": 1}),
        Case("odd", {"ep": 2}), Case("mla", {"ep": 2} | _WIRE),
        Case("gqa", {"ep": 2, "dispatch": {"chunks": 3, "dispatch_dtype": "fp8"}}),
        Case("gqa", {"ep": 2, "dispatch": {"kind": "sync_free"}}), Case("gqa", {"tp": 2, "ep": 2}),
    ],
    4: [
        Case("gqa", {"tp": 2, "ep": 4}), Case("mla", {"tp": 2, "etp": 2, "ep": 2}),
        Case("gqa", {"ep": 4, "dispatch": {"kind": "hierarchical", "node_size": 2}}),
        Case("gqa", {"dp_replicate": 2, "ep": 2} | _WIRE, {"power_of_two": True}),
        Case("odd", {"ep": 1}),
    ],
}  # fmt: skip
"""By number of ranks."""
