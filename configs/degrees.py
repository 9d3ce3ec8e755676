"""The parallel degrees of a run, resolved for a number of ranks: plain arithmetic, no torch.

Ranks are row-major in `(dp_replicate, dp_shard)` for dense parameters and in
`(dp_replicate, efsdp, ep)` for experts; both cover the same ranks, so
`dp_shard = efsdp * ep`. `parallel.mesh` turns the result into device meshes.
"""

import math
from dataclasses import dataclass

from configs.rules import ConfigError
from configs.schema import RunConfig


@dataclass(frozen=True)
class Degrees:
    """Sizes of all mesh axes; every value is at least 1 and the products agree."""

    dp_replicate: int
    dp_shard: int
    efsdp: int
    ep: int

    @property
    def world(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def data_ranks(self) -> int:
        """Ranks that read different data."""
        return self.dp_replicate * self.dp_shard

    def table(self) -> list[tuple[str, int, str]]:
        """Rows (axis, size, meaning) for people."""
        return [
            ("dp_replicate", self.dp_replicate, "replicas of the sharded model"),
            ("dp_shard", self.dp_shard, "ranks that shard dense parameters"),
            ("efsdp", self.efsdp, "ranks that shard the same experts"),
            ("ep", self.ep, "ranks that divide the experts"),
        ]


def resolve(config: RunConfig, world: int) -> Degrees:
    """Degrees for `world` ranks. Raises ConfigError that shows the product that failed."""
    parallel, n_experts = config.parallel, config.model.moe.n_experts
    shard = parallel.dp_shard
    if shard == -1:
        shard = max(world // parallel.dp_replicate, 1)
    if parallel.dp_replicate * shard != world:
        raise ConfigError(
            f"parallel: dp_replicate {parallel.dp_replicate} x dp_shard {shard} = "
            f"{parallel.dp_replicate * shard}, but there are {world} ranks; "
            + _remedy(parallel.dp_replicate, parallel.dp_shard, world)
        )
    ep = math.gcd(shard, n_experts) if parallel.ep == -1 else parallel.ep
    if n_experts % ep:
        raise ConfigError(
            f"parallel.ep = {ep}: must divide model.moe.n_experts = {n_experts}; "
            f"use one of {_divisors(math.gcd(shard, n_experts))}"
        )
    if shard % ep:
        raise ConfigError(
            f"parallel.ep = {ep}: efsdp x ep = dp_shard = {shard} has no whole solution; "
            f"use one of {_divisors(math.gcd(shard, n_experts))}"
        )
    degrees = Degrees(parallel.dp_replicate, shard, shard // ep, ep)
    per_pass = config.train.micro_batch * degrees.data_ranks
    if config.train.global_batch % per_pass:
        nearest = max(round(config.train.global_batch / per_pass), 1) * per_pass
        raise ConfigError(
            f"train.global_batch = {config.train.global_batch}: must be a multiple of "
            f"train.micro_batch {config.train.micro_batch} x {degrees.data_ranks} data ranks = "
            f"{per_pass}; the nearest is {nearest}"
        )
    return degrees


def default_world(config: RunConfig) -> int:
    """The ranks an experiment names itself: the product of its degrees, with -1 counted as
    the smallest size that works."""
    shard = config.parallel.dp_shard
    return config.parallel.dp_replicate * (max(config.parallel.ep, 1) if shard == -1 else shard)


def _remedy(replicate: int, shard: int, world: int) -> str:
    if shard == -1:
        return f"start a multiple of {replicate} ranks"
    if world % replicate == 0:
        return f"start {replicate * shard} ranks, or set parallel.dp_shard = {world // replicate}"
    return f"start {replicate * shard} ranks"


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
