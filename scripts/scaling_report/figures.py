"""The figures of a report: a point per number of ranks, mesh and routing, from its repeats."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from configs.errors import UserError
from scripts.scaling_report.exchanged import Exchange, exchanged
from scripts.scaling_report.goodput import read_goodput
from scripts.scaling_report.projection import errors_of_projection, projections
from scripts.scaling_report.runs import MeasuredRun, check_comparable
from scripts.scaling_report.traces import breakdown, read_trace

_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for a two-sided interval of 95 percent and 1, 2, ... degrees of freedom."""
ROUTING = {False: "natural", True: "forced"}


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 percent interval (Student's t); None for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    t = _T_95[min(len(values) - 1, len(_T_95)) - 1]
    return mean, t * statistics.stdev(values) / math.sqrt(len(values))


def report_of(runs: list[MeasuredRun], project: Sequence[int] = ()) -> dict[str, Any]:
    """The content of report.json. project: numbers of ranks to compute projected points for.
    Raises UserError for runs that cannot be compared."""
    kind = check_comparable(runs)
    groups: dict[tuple[bool, int, tuple[tuple[str, int], ...]], list[MeasuredRun]] = defaultdict(
        list
    )
    for run in runs:
        groups[run.is_forced, run.ranks, tuple(run.mesh.items())].append(run)
    if len({run.ranks for run in runs}) < 2:
        raise UserError(f"all runs have {runs[0].ranks} ranks: a report compares several numbers")
    points = [_point(group) for _, group in sorted(groups.items())]
    is_weak = kind == "weak"
    projected = projections(points, list(project), is_weak) if project else []
    for forced in ROUTING:
        _add_efficiency([p for p in [*points, *projected] if p["forced_routing"] is forced])
    return {
        "scaling": kind,
        "device": runs[0].device,
        "model_parameters": runs[0].config.model.n_parameters,
        "tokens_per_sequence": runs[0].config.data.seq_len,
        "points": [*points, *projected],
        "projection_errors": errors_of_projection(points, is_weak),
        "remarks": _remarks(runs),
    }


def _remarks(runs: list[MeasuredRun]) -> list[str]:
    """What the reader has to know about the runs."""
    found = []
    ranks = {run.ranks for run in runs}
    for forced, name in ROUTING.items():
        some = {run.ranks for run in runs if run.is_forced is forced}
        if not some and runs[0].config.model.moe.n_experts > 1:
            found.append(
                f"No run has {name} routing; the other kind alone does not show what imbalance "
                "costs."
            )
        elif some and some != ranks:
            missing = ", ".join(map(str, sorted(ranks - some)))
            base = f"; its efficiency is relative to {min(some)} ranks" * (min(some) > min(ranks))
            found.append(f"No run with {name} routing has {missing} ranks{base}.")
    return found + [
        f"{run.folder.name}: {run.unreadable} steps have no usable record; they are left out."
        for run in runs
        if run.unreadable
    ]


def _point(runs: list[MeasuredRun]) -> dict[str, Any]:
    speed, width = interval([run.tokens_per_s for run in runs])
    first = runs[0]
    loads = [run.imbalance for run in runs if run.imbalance is not None]
    found: dict[str, Any] = {
        "kind": "measured",
        "forced_routing": first.is_forced,
        "ranks": first.ranks,
        "mesh": {axis: size for axis, size in first.mesh.items() if size > 1},
        "repeats": len(runs),
        "global_batch": first.config.train.global_batch,
        "micro_batch": first.config.train.micro_batch,
        "tokens_per_s": speed,
        "tokens_per_s_half_width": width,
        "tokens_per_s_per_rank": speed / first.ranks,
        "step_s_median": statistics.median([s for run in runs for s in run.step_s]),
        "step_s_largest": max(s for run in runs for s in run.step_s),
        "data_share": statistics.fmean(run.data_share for run in runs),
        "memory_gib": max(run.memory_gib for run in runs),
        "imbalance": statistics.fmean(loads) if loads else None,
        "restarts": sum(len(run.attempts) - 1 for run in runs),
    }
    if all(run.mfu is not None for run in runs):
        found["mfu"] = statistics.fmean(run.mfu or 0.0 for run in runs)
    profiles = [profile for run in runs if (profile := _profile(run))]
    if profiles:
        parts = [part for part, _ in profiles]
        found["breakdown"] = {key: statistics.fmean(p[key] for p in parts) for key in parts[0]}
        found["exchanged"] = _mean_exchange([rows for _, rows in profiles])
    times = [one for run in runs if (one := read_goodput(run.folder, run.attempts))]
    if times:
        found["elapsed"] = {key: statistics.fmean(one[key] for one in times) for key in times[0]}
    return found


def _profile(run: MeasuredRun) -> tuple[dict[str, float], list[Exchange]] | None:
    """Mean over the ranks of the last profiled step, the spread of their work, and the bytes that
    a rank exchanged."""
    traces = sorted((run.folder / "profile").glob("step-*.json"))
    if not traces:
        return None
    step = traces[-1].name.rsplit("-rank-", 1)[0]
    of_step = [path for path in traces if path.name.startswith(f"{step}-rank-")]
    if len(of_step) != run.ranks:
        raise UserError(
            f"{run.folder}: {len(of_step)} traces of {step}, but {run.ranks} ranks; copy all of "
            "profile/"
        )
    try:
        read = [read_trace(path) for path in of_step]
        ranks = [breakdown(events) for events in read]
        rows = exchanged(run, read)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UserError(f"{run.folder}: a trace cannot be read: {error}") from None
    mean = {key: statistics.fmean(rank[key] for rank in ranks) for key in ranks[0]}
    busy = [1 - sum(v for key, v in rank.items() if key.endswith("exposed")) for rank in ranks]
    return mean | {"busiest rank / mean": max(busy) / statistics.fmean(busy)}, rows


def _mean_exchange(runs: list[list[Exchange]]) -> list[dict[str, Any]]:
    """Of the repeats of a point, which have the same rows."""
    return [
        {
            "kind": repeats[0].kind,
            "axes": list(repeats[0].axes),
            "predicted_bytes": repeats[0].predicted,
            "measured_bytes": _mean_of([one.measured for one in repeats]),
        }
        for repeats in zip(*runs, strict=True)
    ]


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _add_efficiency(points: list[dict[str, Any]]) -> None:
    """Tokens/s per rank over those of the measured point with the fewest ranks; relative errors add
    as squares, as for independent figures."""
    if not points:
        return
    measured = [point for point in points if point["kind"] == "measured"]
    base = min(measured, key=lambda point: (point["ranks"], -point["tokens_per_s"]))
    for point in points:
        ratio = point["tokens_per_s_per_rank"] / base["tokens_per_s_per_rank"]
        point["efficiency"] = ratio
        widths = [p.get("tokens_per_s_half_width") for p in (point, base)]
        if point is base or None in widths:
            point["efficiency_half_width"] = 0.0 if point is base else None
        else:
            errors = [w / p["tokens_per_s"] for w, p in zip(widths, (point, base), strict=True)]
            point["efficiency_half_width"] = ratio * math.hypot(*errors)
