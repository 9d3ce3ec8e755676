"""The figures of a report: a point per number of ranks, mesh and routing, from its repeats."""

import math
import statistics
from collections import defaultdict
from typing import Any

from configs.errors import UserError
from scripts.scaling_report.runs import MeasuredRun, check_comparable
from scripts.scaling_report.traces import breakdown

_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for a two-sided interval of 95 percent and 1, 2, ... degrees of freedom."""


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 percent interval (Student's t); None for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    t = _T_95[min(len(values) - 1, len(_T_95)) - 1]
    return mean, t * statistics.stdev(values) / math.sqrt(len(values))


def report_of(runs: list[MeasuredRun]) -> dict[str, Any]:
    """The content of report.json. Raises UserError for runs that cannot be compared."""
    kind = check_comparable(runs)
    groups: dict[tuple[bool, int, tuple[tuple[str, int], ...]], list[MeasuredRun]] = defaultdict(
        list
    )
    for run in runs:
        groups[run.is_forced, run.ranks, tuple(run.mesh.items())].append(run)
    points = [_point(group) for _, group in sorted(groups.items())]
    for forced in (False, True):
        _add_efficiency([point for point in points if point["forced_routing"] is forced])
    if len({run.ranks for run in runs}) < 2:
        raise UserError(f"all runs have {runs[0].ranks} ranks: a report compares several numbers")
    return {
        "scaling": kind,
        "device": runs[0].device,
        "model_parameters": runs[0].config.model.n_parameters,
        "tokens_per_sequence": runs[0].config.data.seq_len,
        "points": points,
    }


def _point(runs: list[MeasuredRun]) -> dict[str, Any]:
    speed, width = interval([run.tokens_per_s for run in runs])
    first = runs[0]
    found: dict[str, Any] = {
        "kind": "measured",
        "forced_routing": first.is_forced,
        "ranks": first.ranks,
        "mesh": {axis: size for axis, size in first.mesh.items() if size > 1},
        "repeats": len(runs),
        "global_batch": first.config.train.global_batch,
        "tokens_per_s": speed,
        "tokens_per_s_half_width": width,
        "tokens_per_s_per_rank": speed / first.ranks,
        "step_s_median": statistics.median([s for run in runs for s in run.step_s]),
        "step_s_largest": max(s for run in runs for s in run.step_s),
        "data_share": statistics.fmean(run.data_share for run in runs),
        "memory_gib": max(run.memory_gib for run in runs),
        "imbalance": statistics.fmean(run.imbalance for run in runs),
        "restarts": sum(run.starts - 1 for run in runs),
    }
    if all(run.mfu is not None for run in runs):
        found["mfu"] = statistics.fmean(run.mfu or 0.0 for run in runs)
    parts = [_breakdown(run) for run in runs]
    parts = [part for part in parts if part]
    if parts:
        found["breakdown"] = {key: statistics.fmean(p[key] for p in parts) for key in parts[0]}
    return found


def _breakdown(run: MeasuredRun) -> dict[str, float]:
    """Mean over the ranks of one profiled step, and the spread of their work."""
    traces = sorted((run.folder / "profile").glob("step-*.json"))
    if not traces:
        return {}
    step = traces[-1].name.rsplit("-rank-", 1)[0]
    try:
        ranks = [breakdown(path) for path in traces if path.name.startswith(step)]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run.folder}: a trace cannot be read: {error}") from None
    mean = {key: statistics.fmean(rank[key] for rank in ranks) for key in ranks[0]}
    busy = [1 - sum(v for key, v in rank.items() if key.endswith("exposed")) for rank in ranks]
    return mean | {"busiest rank / mean": max(busy) / statistics.fmean(busy)}


def _add_efficiency(points: list[dict[str, Any]]) -> None:
    """Tokens/s per rank over those of the point with the fewest ranks; relative errors add as
    squares, as for independent figures."""
    if not points:
        return
    base = min(points, key=lambda point: (point["ranks"], -point["tokens_per_s"]))
    for point in points:
        ratio = point["tokens_per_s_per_rank"] / base["tokens_per_s_per_rank"]
        point["efficiency"] = ratio
        widths = [p["tokens_per_s_half_width"] for p in (point, base)]
        if point is base or None in widths:
            point["efficiency_half_width"] = 0.0 if point is base else None
        else:
            errors = [w / p["tokens_per_s"] for w, p in zip(widths, (point, base), strict=True)]
            point["efficiency_half_width"] = ratio * math.hypot(*errors)
