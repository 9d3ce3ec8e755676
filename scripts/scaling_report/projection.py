"""Speed at numbers of ranks that were not run, computed from the step of a measured point.

    T(n) = T(m) * [(1 - F) * s + F * r]
    s = m / n with the same global batch (strong scaling), 1 where it grows with the ranks (weak)
    r = ((n - 1) / n) / ((m - 1) / m)

T: seconds of a step; m: ranks of the measured point, at least 2; F: share of its profiled step that
is exposed communication of weights and gradients (FSDP and all-reduces). The rest, with the exposed
exchange of tokens, is proportional to the tokens of a rank. A ring moves (n - 1) / n of the weights
whatever the number of ranks, so r is at most 2.

Assumed: only the data-parallel size grows; every link is as fast as the measured ones; what was
hidden behind computation stays hidden; loads and their imbalance stay as measured. A network that
is slower between nodes than within one is not in it: project from a point with several nodes.
"""

from typing import Any

from configs.errors import UserError

_FIXED = ("FSDP, exposed", "other, exposed")
"""Parts of a profiled step whose bytes do not depend on the tokens of a rank."""


def project(point: dict[str, Any], ranks: int, is_weak: bool) -> dict[str, Any]:
    """The point with `ranks` ranks, from a measured one with a breakdown. See the module."""
    measured = point["ranks"]
    fixed = sum(point["breakdown"][part] for part in _FIXED)
    tokens = 1.0 if is_weak else measured / ranks
    ring = ((ranks - 1) / ranks) / ((measured - 1) / measured)
    ratio = (1 - fixed) * tokens + fixed * ring
    batch = point["global_batch"] * (ranks / measured if is_weak else 1)
    speed = point["tokens_per_s"] / ratio * (batch / point["global_batch"])
    return {
        "kind": "projected",
        "from_ranks": measured,
        "forced_routing": point["forced_routing"],
        "ranks": ranks,
        "tokens_per_s": speed,
        "tokens_per_s_per_rank": speed / ranks,
        "step_s_median": point["step_s_median"] * ratio,
    }


def projections(points: list[dict[str, Any]], ranks: list[int], is_weak: bool) -> list[Any]:
    """Projected points with these ranks per routing, each from the measured point with the most
    ranks. Raises UserError, one line, where there is none to project from."""
    found = []
    for forced in sorted({point["forced_routing"] for point in points}):
        some = [p for p in points if p["forced_routing"] is forced]
        usable = [p for p in some if p["ranks"] > 1 and "breakdown" in p]
        name = "forced" if forced else "natural"
        if not usable:
            raise UserError(
                f"--project: no measured point with {name} routing has at least 2 ranks and a "
                "profiled step"
            )
        base = max(usable, key=lambda point: (point["ranks"], point["tokens_per_s"]))
        most = max(point["ranks"] for point in some)
        if wrong := [n for n in ranks if n <= most]:
            raise UserError(
                f"--project {wrong[0]}: {most} ranks were measured; give larger numbers"
            )
        if not is_weak:
            _check_batch(base, ranks)
        found += [project(base, n, is_weak) for n in ranks]
    return found


def _check_batch(base: dict[str, Any], ranks: list[int]) -> None:
    """Raise UserError for numbers of ranks among which the global batch cannot be divided."""
    batch, micro, tp = base["global_batch"], base["micro_batch"], base["mesh"].get("tp", 1)
    for n in ranks:
        if n % tp or batch % (micro * (n // tp)):
            raise UserError(
                f"--project {n}: {n} ranks cannot divide a global batch of {batch} sequences in "
                f"microbatches of {micro} (tp {tp}); with the same global batch, numbers up to "
                f"{batch // micro * tp} are possible"
            )


def errors_of_projection(points: list[dict[str, Any]], is_weak: bool) -> list[dict[str, Any]]:
    """What the formula would have predicted for each measured point from the next smaller one of
    the same routing that can be projected from, and its error."""
    found = []
    for point in points:
        smaller = [
            p for p in points
            if p["forced_routing"] is point["forced_routing"] and "breakdown" in p
            and 1 < p["ranks"] < point["ranks"]
        ]  # fmt: skip
        if smaller:
            base = max(smaller, key=lambda p: (p["ranks"], p["tokens_per_s"]))
            speed = project(base, point["ranks"], is_weak)["tokens_per_s"]
            found.append({
                "forced_routing": point["forced_routing"], "from_ranks": base["ranks"],
                "ranks": point["ranks"], "predicted": speed, "measured": point["tokens_per_s"],
                "error": speed / point["tokens_per_s"] - 1,
            })  # fmt: skip
    return found
