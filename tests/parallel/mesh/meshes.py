"""The meshes and models whose training must equal that of one process."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from configs.model import ModelConfig
from tests.models.families import FAMILIES

SEQ_LEN, GLOBAL_BATCH, PASSES = 32, 16, 2
"""Longer than the families' windows, chunks and original RoPE length; two microbatches a step."""
ODD = "odd "
"""Prefix of a family's name: its model with sizes that 3 and 6 ranks can divide, on batches that
are no powers of two."""
ODD_SEQ_LEN, ODD_BATCH, ODD_PASSES = 30, 12, 2
MANY = "many "
"""The same model with twice the batch, for 16 ranks."""
ONCE = "once "
"""The same model with one microbatch a step."""


@dataclass(frozen=True)
class Case:
    """One mesh for one family, other settings of `[parallel]` and `[parallel.dispatch]`, and an
    inserted fault."""

    family: str
    dp_replicate: int
    dp_shard: int
    tp: int
    ep: int
    etp: int
    more: tuple[tuple[str, Any], ...] = ()
    dispatch: tuple[tuple[str, Any], ...] = ()
    fault: str = "none"

    @property
    def name(self) -> str:
        sizes = [("rep", self.dp_replicate), ("shard", self.dp_shard), ("tp", self.tp)]
        sizes += [("ep", self.ep), ("etp", self.etp)]
        parts = [f"{axis}{size}" for axis, size in sizes if size > 1]
        parts += [f"{key}={value}" for key, value in self.more + self.dispatch]
        fault = [] if self.fault == "none" else [self.fault.replace("/", "over")]
        return " ".join([self.family, *parts, *fault])

    @property
    def world(self) -> int:
        return self.dp_replicate * self.dp_shard * self.tp

    def settings(self) -> dict[str, Any]:
        """The experiment as nested tables."""
        axes = ("dp_replicate", "dp_shard", "tp", "ep", "etp")
        data_ranks = self.dp_replicate * self.dp_shard
        length, batch, passes = SEQ_LEN, GLOBAL_BATCH, PASSES
        if self.family.startswith(ODD):
            length, batch, passes = ODD_SEQ_LEN, ODD_BATCH, ODD_PASSES
        if self.family.startswith(MANY):
            batch *= 2
        if self.family.startswith(ONCE):
            passes = 1
        more = dict(self.more) | {"dispatch": dict(self.dispatch)}
        return {
            "run": {"dir": "unused"},
            "data": {"seq_len": length},
            "model": asdict(model_of(self.family)),
            "train": {
                "steps": 1,
                "z_loss_coef": 0.01,
                "global_batch": batch,
                "micro_batch": batch // passes // data_ranks,
            },
            "optimizer": {"lr": 0.1},
            "parallel": {axis: getattr(self, axis) for axis in axes} | more,
        }


def wide(model: ModelConfig) -> ModelConfig:
    """A family's small model with sizes that 8 ranks can divide, and with every auxiliary loss.

    It has one layer of every kind, or two if all are alike: the time of a layer depends on its
    number of operations, which is the same for microbatches of any size.
    """
    attention = replace(model.attention, n_heads=8, full_every=min(model.attention.full_every, 2))
    if attention.kind == "gqa":
        attention = replace(attention, n_kv_heads=8 if model.attention.n_kv_heads == 0 else 4)
    moe = replace(
        model.moe, n_experts=8, d_expert=16,
        seq_aux_loss_coef=0.1, global_aux_loss_coef=0.1, router_z_loss_coef=0.1,
    )  # fmt: skip
    return replace(model, n_layers=2, attention=attention, moe=moe, d_ff=model.d_ff and 48)


def odd(model: ModelConfig) -> ModelConfig:
    """The same with sizes that 3 and 6 ranks can divide."""
    made = wide(model)
    kv_heads = made.attention.n_kv_heads
    if made.attention.kind == "gqa":
        kv_heads = 12 if model.attention.n_kv_heads == 0 else 6
    attention = replace(made.attention, n_heads=12, n_kv_heads=kv_heads)
    moe = replace(made.moe, n_experts=6, d_expert=18, n_groups=min(made.moe.n_groups, 3))
    return replace(made, attention=attention, moe=moe, d_model=42)


def model_of(family: str) -> ModelConfig:
    """The model of a case."""
    if family.startswith(ODD):
        return odd(FAMILIES[family.removeprefix(ODD)])
    return wide(FAMILIES[family.removeprefix(MANY).removeprefix(ONCE)])


def alone(family: str) -> Case:
    """The same training in one process."""
    return Case(family, 1, 1, 1, 1, 1)


def all_meshes(family: str, world: int) -> list[Case]:
    """Every mesh of `world` ranks that divides the model of a family."""
    model = model_of(family)
    kv_heads, n_experts = model.attention.kv_heads, model.moe.n_experts
    return [
        Case(family, replicate, world // replicate // tp, tp, ep, etp)
        for replicate in _divisors(world)
        for tp in _divisors(world // replicate)
        if kv_heads % tp == 0
        for etp in sorted({1, tp})
        for ep in _divisors(world // replicate // etp)
        if n_experts % ep == 0
    ]


def hard_meshes(family: str) -> list[Case]:
    """Three meshes of four ranks that use every axis."""
    return [
        Case(family, 1, 2, 2, 4, 1),
        Case(family, 1, 2, 2, 2, 2),
        Case(family, 2, 1, 2, 2, 1),
    ]


def thirds(family: str) -> list[Case]:
    """Meshes of six ranks that use every axis, each axis once with three ranks."""
    return [
        Case(family, 1, 2, 3, 6, 1),
        Case(family, 3, 1, 2, 1, 2),
        Case(family, 1, 2, 3, 2, 3),
        Case(family, 2, 3, 1, 3, 1),
    ]


def pairwise(family: str, world: int) -> list[Case]:
    """Meshes of this many ranks that cover every valid pair of values of two axes."""
    left = all_meshes(family, world)
    missing = set().union(*map(pairs, left))
    chosen = []
    while missing:
        best = max(left, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def pairs(case: Case) -> set[tuple[str, int, str, int]]:
    """For every two axes, whether each is 1 or more."""
    sizes = {"rep": case.dp_replicate, "shard": case.dp_shard, "tp": case.tp}
    axes = list((sizes | {"ep": case.ep, "etp": case.etp}).items())
    # the code only distinguishes 1 and more than 1
    axes = [(axis, min(size, 2)) for axis, size in axes]
    return {(a, x, b, y) for i, (a, x) in enumerate(axes) for b, y in axes[i + 1 :]}


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
