"""The properties of every parameter that other modules use, in one table.

Initialization (`models.init`), weight decay (`train.optimizer`), tensor and expert parallelism
(`parallel.tensor`, `parallel.expert`) and FP8 (`models.fp8`, `parallel.fsdp.fp8_weights`) read it.
A parameter that is not in the table is an error, not a default. Its Hugging Face name is in the
family's file (`models.hf.families`), which must contain every parameter of the model.

E experts, F width of a feed-forward, D model width, H heads with their width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParamSpec:
    """Properties of one parameter."""

    init: Literal["normal", "residual", "ones", "zeros"]
    """normal: of `init_std`; residual: that over sqrt(2 * n_layers), for parameters that write into
    the residual stream."""
    decay: bool = True
    """Whether weight decay applies to it."""
    tp: int | None = None
    """The dimension that tensor parallelism divides. None: not divided."""
    ep: int | None = None
    """The dimension of the expert index."""
    etp: int | None = None
    """The dimension of an expert that the ranks of `etp` divide."""
    padded: bool = False
    """A divided bias that is added before a sum over the ranks: each rank adds its slice, padded
    with zeros, so that the sum counts it once."""
    fp8: bool = False
    """Whether it is an operand of a product that the recipe `fp8_blockwise` can run in FP8."""


_NORM = ParamSpec("ones", decay=False)
_BIAS = ParamSpec("zeros", decay=False, tp=0)
_PROJECTION = ParamSpec("normal", fp8=True)
_HEADS = ParamSpec("normal", tp=0, fp8=True)
_WIDE = ParamSpec("normal", tp=1, fp8=True)
_NARROW = ParamSpec("residual", tp=1, fp8=True)

PARAMETERS = {
    "embed.weight": ParamSpec("normal", tp=0),  # [V, D]
    "head.weight": ParamSpec("normal", tp=0),  # [V, D]
    **{f"{name}.weight": _NORM for name in (
        "norm", "attention_norm", "ffn_norm", "q_norm", "k_norm", "q_a_norm", "kv_a_norm", "enorm",
        "hnorm",
    )},
    "eh_proj.weight": _PROJECTION,
    "wq_a.weight": _PROJECTION,
    "wkv_a.weight": _PROJECTION,
    "wq.weight": _HEADS,  # [H, D or compressed]
    "wk.weight": _HEADS,
    "wv.weight": _HEADS,
    "wkv_b.weight": _HEADS,
    "wo.weight": _NARROW,  # [D, H]
    "wq.bias": _BIAS,
    "wk.bias": _BIAS,
    "wv.bias": _BIAS,
    "wo.bias": ParamSpec("zeros", decay=False, tp=0, padded=True),
    "attention.sinks": ParamSpec("zeros", decay=False, tp=0),
    "ffn.w13": _WIDE,  # [2, F, D]
    "ffn.w2": _NARROW,  # [D, F]
    "shared_experts.w13": _WIDE,
    "shared_experts.w2": _NARROW,
    "router.weight": ParamSpec("normal", decay=False),
    "router.bias": ParamSpec("zeros", decay=False),
    "experts.w13": ParamSpec("normal", ep=0, etp=2, fp8=True),  # [E, 2, F, D]
    "experts.w2": ParamSpec("residual", ep=0, etp=2, fp8=True),  # [E, D, F]
    "experts.b13": ParamSpec("zeros", decay=False, ep=0, etp=2),  # [E, 2, F]
    "experts.b2": ParamSpec("zeros", decay=False, ep=0, etp=1, padded=True),  # [E, D]
}  # fmt: skip
"""By the last two parts of the name: the module's and the parameter's."""


def spec_of(name: str) -> ParamSpec:
    """The properties of the parameter of that (dotted, whole) name."""
    key = ".".join(name.split(".")[-2:])
    if key not in PARAMETERS:
        raise LookupError(
            f"parameter {name}: {key!r} is not declared; give it a ParamSpec in "
            "models/parameters.py"
        )
    return PARAMETERS[key]
