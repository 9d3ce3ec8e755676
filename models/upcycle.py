"""Sparse upcycling: the feed-forwards of a dense model become experts (arXiv:2212.05055).

A feed-forward is a sum over its hidden neurons, so it can be cut into G pieces (granularity) whose
outputs add up to its output. Each piece has `copies` copies; the experts of one copy are adjacent
and start with the same router row, so they have the same score and are chosen together: the top-k
of the first step is a whole copy of the feed-forward ("virtual group", arXiv:2410.07524). With G =
1 every expert is a whole copy.

Routing weights that are divided by their sum add up to 1, spread over the R routed pieces of every
chosen copy, so the down projections are multiplied by R and the layer computes the same as the
dense one for any router. A shared expert has some of the pieces instead of the routed ones, or, if
it has all of them, half of the output. The factors are part of the down projection, which is
linear, because few exported families have a separate factor.

The copies become different only through the data: a router of small random rows assigns them
different tokens. Not implemented: re-initializing part of an expert (Drop-Upcycling,
arXiv:2502.19261).

D model width, F width of the dense feed-forward, f of a piece, G pieces, E experts.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from configs.errors import UserError
from configs.model import ModelConfig, MoEConfig
from configs.rules import between
from models.hf.table import architecture
from models.init import draw
from models.moe import FeedForward, MoE


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Parameters of the conversion of a dense model to experts."""

    copies: int = 4
    """Number of copies of every routed piece in a layer."""
    granularity: int = 1
    """Pieces a feed-forward is cut into."""
    top_k: int = 0
    """Experts per token. 0: one copy if it has several pieces, otherwise two copies."""
    shared: int = 0
    """Pieces of the shared expert, which are then not routed; `granularity`: all pieces are both
    shared and routed, each side with half of the output."""
    dense_layers: int = 0
    """Number of first layers that stay dense."""
    score_func: Literal["auto", "softmax", "sigmoid"] = "auto"
    """`auto`: softmax, unless only sigmoid scores have a Hugging Face architecture."""
    norm_top_k: bool = True
    """Divide the chosen scores by their sum."""
    noise: float = 0.0
    """Gaussian noise on every expert, as a share of its weights' root mean square."""
    router_std: float = 0.02
    """Standard deviation of the router's rows."""

    def __post_init__(self) -> None:
        between(self, 1, 2**12, "copies", "granularity")
        between(self, 0, self.granularity, "shared")
        between(self, 0, self.n_experts, "top_k")
        between(self, 0, 10_000, "dense_layers")
        between(self, 0, 10, "noise", "router_std")
        if self.score_func not in ("auto", "softmax", "sigmoid"):
            raise UserError(
                f"score_func = {self.score_func!r}: must be one of auto, softmax, sigmoid"
            )
        if not self.router_std:
            raise UserError(
                "router_std = 0: all tokens would visit the same experts, and equal copies that "
                "see the same tokens never differ"
            )

    @property
    def routed(self) -> int:
        """Routed pieces of one copy."""
        return self.granularity - self.shared or self.granularity

    @property
    def n_experts(self) -> int:
        return self.copies * self.routed

    @property
    def visited(self) -> int:
        """`top_k`, resolved."""
        return self.top_k or (self.routed if self.routed > 1 else min(2, self.copies))

    @property
    def covers(self) -> bool:
        """Whether a token's experts are whole copies."""
        return self.visited % self.routed == 0

    def changes(self, moe: MoEConfig) -> list[str]:
        """Why the MoE does not compute the same as the dense model; empty if it does."""
        complete = moe.score_func == "softmax" and moe.top_k == moe.n_experts
        reasons = {
            f"noise = {self.noise} moves the experts": self.noise > 0,
            f"top_k = {self.visited} is no multiple of the {self.routed} pieces of a copy, so "
            "tokens miss some": not self.covers,
            "norm_top_k is off, so the routing weights do not add up to 1": not moe.norm_top_k
            and not complete,
        }
        return [reason for reason, holds in reasons.items() if holds]


def upcycled_model(dense: ModelConfig, recipe: Recipe) -> ModelConfig:
    """The MoE's model for a dense one. Raises UserError if the recipe does not fit."""
    if recipe.dense_layers > dense.n_layers:
        raise UserError(
            f"dense_layers = {recipe.dense_layers}: the model has n_layers = {dense.n_layers}"
        )
    if dense.d_ff % recipe.granularity:
        raise UserError(
            f"granularity = {recipe.granularity}: must divide the feed-forward's width {dense.d_ff}"
        )
    models = []
    for score_func in ("softmax", "sigmoid"):
        if recipe.score_func not in ("auto", score_func):
            continue
        moe = MoEConfig(
            n_experts=recipe.n_experts,
            top_k=recipe.visited,
            d_expert=dense.d_ff // recipe.granularity,
            n_shared_experts=recipe.shared,
            score_func=score_func,
            norm_top_k=recipe.norm_top_k,
            bias_update_rate=1e-3 if score_func == "sigmoid" else 0.0,
        )
        d_ff = dense.d_ff if recipe.dense_layers else 0
        models.append(replace(dense, n_dense_layers=recipe.dense_layers, d_ff=d_ff, moe=moe))
    return next(filter(_is_exportable, models), models[0])


def _is_exportable(model: ModelConfig) -> bool:
    try:
        architecture(model)
    except UserError:
        return False
    return True


def upcycled_layer(
    ffn: dict[str, Tensor], model: ModelConfig, recipe: Recipe, seed: int, name: str
) -> dict[str, Tensor]:
    """The MoE of one layer, by the names of `models.moe.MoE`.

    ffn: the dense `w13` [2, F, D] and `w2` [D, F]. name: of the layer; (seed, name) determines its
    random numbers.
    """
    g, s, moe = recipe.granularity, recipe.shared, model.moe
    w13_G2fD = ffn["w13"].unflatten(1, (g, -1)).transpose(0, 1)
    w2_GDf = ffn["w2"].unflatten(1, (g, -1)).transpose(0, 1)
    first = s % g  # with all pieces shared, all are routed too
    half = 0.5 if s == g else 1.0
    layer = {
        "router.weight": _router(model, recipe, seed, name),
        "router.bias_E": torch.zeros(moe.n_experts),
        "experts.w13": w13_G2fD[first:].repeat(recipe.copies, 1, 1, 1),
        "experts.w2": w2_GDf[first:].repeat(recipe.copies, 1, 1)
        * (half * _routed_scale(recipe, moe)),
    }
    if recipe.noise:
        for key in ("experts.w13", "experts.w2"):
            for e, weight in enumerate(layer[key]):
                std = recipe.noise * float(weight.square().mean().sqrt())
                weight += draw(seed, f"{name}.{key}/{e}/noise", tuple(weight.shape), std)
    if s:
        layer["shared_experts.w13"] = w13_G2fD[:s].transpose(0, 1).flatten(1, 2)
        layer["shared_experts.w2"] = w2_GDf[:s].transpose(0, 1).flatten(1, 2) * half
    return layer


def _routed_scale(recipe: Recipe, moe: MoEConfig) -> float:
    """Factor on the down projections, so that the routed experts add up.

    Without normalization the sum of the weights is known only for a router whose logits are all
    zero: top_k / n_experts for softmax, top_k / 2 for sigmoid.
    """
    if moe.norm_top_k:
        return recipe.routed
    total = moe.top_k / moe.n_experts if moe.score_func == "softmax" else moe.top_k / 2
    return recipe.routed / total


def _router(model: ModelConfig, recipe: Recipe, seed: int, name: str) -> Tensor:
    """`[E, D]`: one row per copy, or per expert if the experts of a token are not whole copies."""
    rows = recipe.copies if recipe.covers else recipe.n_experts
    weight = draw(seed, f"{name}.router.weight", (rows, model.d_model), recipe.router_std)
    return weight.repeat_interleave(recipe.n_experts // rows, dim=0)


@torch.no_grad()
def layer_difference(ffn: dict[str, Tensor], layer: dict[str, Tensor], model: ModelConfig) -> float:
    """||MoE(x) - FFN(x)|| / ||FFN(x)|| on 64 random rows, fp32: the actual effect of the recipe."""
    with torch.device("meta"):
        dense, sparse = FeedForward(model.d_model, ffn["w13"].shape[1]), MoE(model)
    dense.load_state_dict(ffn, assign=True)
    sparse.load_state_dict(layer, assign=True)
    x_TD = draw(0, "rows", (64, model.d_model), 1.0)
    expected = dense(x_TD)
    return float((sparse.eval()(x_TD) - expected).norm() / expected.norm().clamp(min=1e-30))
