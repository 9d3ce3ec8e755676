"""The parallel degrees of a run, resolved for a number of ranks by arithmetic, without torch.

Ranks are row-major in `(dp_replicate, dp_shard, tp)` for dense parameters and in
`(dp_replicate, efsdp, ep, etp)` for experts; both cover the same ranks, so
`dp_shard * tp = efsdp * ep * etp`. `parallel.mesh` turns the result into device meshes.
"""

import math
from dataclasses import dataclass

from configs.dispatch import check_nodes
from configs.errors import ConfigError, UserError
from configs.model import ModelConfig
from configs.schema import JobConfig


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of all mesh axes, each at least 1: `dp_shard * tp = efsdp * ep * etp`."""

    dp_replicate: int
    dp_shard: int
    tp: int
    efsdp: int
    ep: int
    etp: int

    @property
    def world(self) -> int:
        return self.dp_replicate * self.dp_shard * self.tp

    @property
    def data_ranks(self) -> int:
        """Ranks that read different data."""
        return self.dp_replicate * self.dp_shard

    def data_rank(self, rank: int) -> int:
        """Index of the data rank of `rank`; the ranks of one `tp` group read the same data."""
        return rank // self.tp

    def table(self) -> list[tuple[str, int, str]]:
        """Rows (axis, size, meaning) to print."""
        return [
            ("dp_replicate", self.dp_replicate, "replicas of the sharded model"),
            ("dp_shard", self.dp_shard, "ranks that shard dense parameters"),
            ("tp", self.tp, "ranks that divide heads, widths and vocabulary"),
            ("efsdp", self.efsdp, "ranks that shard the same experts"),
            ("ep", self.ep, "ranks that divide the experts"),
            ("etp", self.etp, "ranks that divide the width of an expert"),
        ]


def resolve(config: JobConfig, world: int) -> ParallelDims:
    """ParallelDims for `world` ranks. Raises ConfigError that shows the wrong product."""
    parallel, n_experts = config.parallel, config.model.moe.n_experts
    replicate, shard, tp, etp = parallel.dp_replicate, parallel.dp_shard, parallel.tp, parallel.etp
    if shard == -1:
        shard = max(world // (replicate * tp), 1)
    if replicate * shard * tp != world:
        raise ConfigError(
            f"parallel: dp_replicate {replicate} x dp_shard {shard} x tp {tp} = "
            f"{replicate * shard * tp}, but there are {world} ranks; "
            + _remedy(replicate * tp, parallel.dp_shard, world)
        )
    _check_tensor_parallel(config)
    ranks = shard * tp // etp
    ep = math.gcd(ranks, n_experts) if parallel.ep == -1 else parallel.ep
    if n_experts % ep:
        raise ConfigError(
            f"parallel.ep = {ep}: must divide model.moe.n_experts = {n_experts}; "
            f"use one of {_divisors(math.gcd(ranks, n_experts))}"
        )
    if ranks % ep:
        raise ConfigError(
            f"parallel.ep = {ep}: efsdp x ep x etp {etp} = dp_shard {shard} x tp {tp} = "
            f"{shard * tp} has no whole solution; "
            f"use one of {_divisors(math.gcd(ranks, n_experts))}"
        )
    check_nodes(parallel.dispatch, ep)
    parallel_dims = ParallelDims(replicate, shard, tp, ranks // ep, ep, etp)
    per_pass = config.train.micro_batch * parallel_dims.data_ranks
    if config.train.global_batch % per_pass:
        nearest = max(round(config.train.global_batch / per_pass), 1) * per_pass
        raise ConfigError(
            f"train.global_batch = {config.train.global_batch}: must be a multiple of "
            f"train.micro_batch {config.train.micro_batch} x {parallel_dims.data_ranks} data "
            f"ranks = {per_pass}; the nearest is {nearest}"
        )
    return parallel_dims


def resolve_serving(model: ModelConfig, tp: int, ep: int, world: int) -> ParallelDims:
    """ParallelDims of a server with `world` ranks. Raises UserError, one line with the option.

    All ranks compute the same tokens. With `max(tp, ep)` ranks, the ranks of `tp` send different
    tokens to the experts, which stay whole; with `tp x ep` ranks, `tp` divides the width of every
    expert, too. If `ep` exceeds `tp`, there are `ep / tp` groups of `tp` ranks, and `dp_shard` is
    their number.
    """
    for option, size in (("--tp", tp), ("--ep", ep)):
        if size < 1:
            raise UserError(f"{option} {size}: must be at least 1")
    has_experts = any(map(model.is_moe, range(model.n_layers)))
    for key, size in _divided_by_tp(model).items():
        if size % tp:
            raise UserError(f"--tp {tp}: must divide {key} = {size}")
    n_experts = model.moe.n_experts if has_experts else 1
    if n_experts % ep:
        raise UserError(f"--ep {ep}: must divide the number of experts, {n_experts}")
    most, least = max(tp, ep), min(tp, ep)
    allowed = sorted({tp * ep} | ({most} if most % least == 0 else set()))
    if world not in allowed:
        start = f"torchrun --nproc-per-node {allowed[0]} -m serve"
        found = f"there {'is' if world == 1 else 'are'} {world}"
        raise UserError(
            f"--tp {tp} --ep {ep}: {' or '.join(map(str, allowed))} ranks are needed, {found}; "
            f"start them with {start}"
            if most > 1
            else f"{found} ranks: give --tp or --ep, which divide the model among them"
        )
    etp = tp if world == tp * ep else 1
    if has_experts and model.moe.d_expert % etp:
        raise UserError(
            f"--tp {tp}: must divide the width of an expert, {model.moe.d_expert}, or --ep must "
            "be a multiple of it"
        )
    if model.moe.expert_bias and model.d_model % etp:
        raise UserError(f"--tp {tp}: must divide d_model = {model.d_model}")
    return ParallelDims(1, world // tp, tp, world // (ep * etp), ep, etp)


def _check_tensor_parallel(config: JobConfig) -> None:
    """Raise ConfigError if tp or etp does not divide every size that it splits."""
    tp, etp, model = config.parallel.tp, config.parallel.etp, config.model
    divided = {f"model.{key}": size for key, size in _divided_by_tp(model).items()}
    for key, size in (divided | {"data.seq_len": config.data.seq_len}).items():
        if size % tp:
            raise ConfigError(f"parallel.tp = {tp}: must divide {key} = {size}")
    for key, size in (
        ("model.moe.d_expert", model.moe.d_expert), ("model.d_model", model.d_model),
    ):  # fmt: skip
        if size % etp:
            raise ConfigError(f"parallel.etp = {etp}: must divide {key} = {size}")


def _divided_by_tp(model: ModelConfig) -> dict[str, int]:
    """The sizes that tp divides, by their key in the model's config."""
    attention, moe = model.attention, model.moe
    divided = {
        "attention.n_heads": attention.n_heads,
        "attention.n_kv_heads": attention.kv_heads,
        "vocab_size": model.vocab_size,
    }
    if not all(map(model.is_moe, range(model.n_layers))):
        divided["d_ff"] = model.d_ff
    if moe.n_shared_experts:
        divided["moe.d_expert x n_shared_experts"] = moe.d_expert * moe.n_shared_experts
    if attention.bias:
        divided["d_model"] = model.d_model
    return divided


def default_world(config: JobConfig) -> int:
    """The number of ranks that the experiment itself implies: the product of its degrees, with -1
    replaced by the smallest possible size."""
    parallel = config.parallel
    shard, ep = parallel.dp_shard, max(parallel.ep, 1) * parallel.etp
    if shard == -1:
        shard = ep // math.gcd(ep, parallel.tp)
    return parallel.dp_replicate * shard * parallel.tp


def _remedy(others: int, shard: int, world: int) -> str:
    """What to do if the degrees do not match `world`. others: product of the degrees but
    dp_shard."""
    if shard == -1:
        return f"start a multiple of {others} ranks"
    if world % others == 0:
        return f"start {others * shard} ranks, or set parallel.dp_shard = {world // others}"
    return f"start {others * shard} ranks"


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
