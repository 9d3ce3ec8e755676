"""The text of a report: tables and paragraphs, as Markdown and as HTML."""

import html
from collections.abc import Sequence
from typing import Any

from scripts.scaling_report.figures import ROUTING

Table = tuple[str, str, list[list[str]]]
"""Title, a paragraph (may be empty) and rows, the first being the header."""
_FORMULA = (
    "Projected points are computed, not run: T(n) = T(m) * [(1 - F) * s + F * r], with T the "
    "seconds of a step, m the ranks of the measured point, F the share of its profiled step that "
    "is exposed communication of weights and gradients, s = m / n (strong scaling) or 1 "
    "(weak), and r = ((n - 1) / n) / ((m - 1) / m). It assumes that only the "
    "data-parallel size grows, over links as fast as the measured ones."
)


def introduction(report: dict[str, Any]) -> list[str]:
    """The paragraphs before the tables."""
    what = {"strong": "the same global batch", "weak": "a global batch that grows with the ranks"}
    is_projected = any(point["kind"] == "projected" for point in report["points"])
    return [
        *filter(None, [report["note"]]),
        f"{'Points marked measured' if is_projected else 'All points'} are measured, with "
        f"{what[report['scaling']]} ({report['scaling']} scaling) on {report['device']}; about "
        f"{report['model_parameters']:,} parameters, sequences of "
        f"{report['tokens_per_sequence']} tokens.",
        "Efficiency: tokens/s per rank over those of the fewest ranks with the same routing. ±: 95 "
        "percent interval of the mean of the repeats (Student's t); without it there was one. "
        "Forced routing sends tokens round-robin: a benchmark, the router learns nothing.",
        *([_FORMULA] if is_projected else []),
        *report["remarks"],
    ]


def tables(report: dict[str, Any]) -> list[Table]:
    """All tables that have rows."""
    points = report["points"]
    measured = [point for point in points if point["kind"] == "measured"]
    found = [
        ("Speed", "", _speed(points)),
        (
            "Where a profiled step spends its time",
            "Communication overlaps with the other parts. Busiest rank / mean: time in which a "
            "rank does not wait for others.",
            _by_key(measured, "breakdown"),
        ),
        (
            "Where the elapsed time is",
            "From the first start to the last step, all starts. Goodput: steps that were kept; "
            "repeated: steps that a later start computed again; checkpoints: time in which the "
            "training waited for them; between steps: validation, output; down: from the last step "
            "of a start to the next start.",
            _by_key(measured, "elapsed"),
        ),
        (
            "Bytes that a rank exchanges in a step",
            "Predicted by --check for even loads, and measured in the profiled step; of a gather "
            "the result, of others the input. Axes that a trace does not distinguish share a row.",
            _exchanged(measured),
        ),
        (
            "How far the projection is off where it was measured",
            "Each measured point, computed by the formula above from the next smaller one.",
            _projection_errors(report["projection_errors"]) if len(points) > len(measured) else [],
        ),
    ]
    return [table for table in found if table[2][1:]]


def _speed(points: Sequence[dict[str, Any]]) -> list[list[str]]:
    has_mfu = any("mfu" in point for point in points)
    rows = [["routing", "point", "ranks", "mesh", "repeats", "tokens/s", "per rank", "efficiency",
             "step, s (median, largest)", "data wait", "memory, GiB", "max / mean load",
             "restarts", *["MFU"] * has_mfu]]  # fmt: skip
    for point in points:
        start = [ROUTING[point["forced_routing"]], point["kind"], str(point["ranks"])]
        speed = [
            _with_width(point, "tokens_per_s", ",.0f"), f"{point['tokens_per_s_per_rank']:,.0f}",
            _with_width(point, "efficiency", ".2f"),
        ]  # fmt: skip
        if point["kind"] == "projected":
            origin = f"from {point['from_ranks']} ranks"
            step = f"{point['step_s_median']:.3f}"
            rows.append([*start, origin, "", *speed, step, *[""] * (4 + has_mfu)])
            continue
        imbalance = point["imbalance"]
        mesh = ", ".join(f"{axis} {size}" for axis, size in point["mesh"].items()) or "one rank"
        rows.append([
            *start, mesh, str(point["repeats"]), *speed,
            f"{point['step_s_median']:.3f}, {point['step_s_largest']:.3f}",
            f"{point['data_share']:.1%}", f"{point['memory_gib']:.2f}",
            "" if imbalance is None else f"{imbalance:.2f}", str(point["restarts"]),
            *([f"{point['mfu']:.1%}" if "mfu" in point else ""] if has_mfu else []),
        ])  # fmt: skip
    return rows


def _by_key(points: Sequence[dict[str, Any]], key: str) -> list[list[str]]:
    """A row per point that has these shares."""
    some = [point for point in points if key in point]
    rows = [["routing", "ranks", *some[0][key]]] if some else []
    for point in some:
        shares = [f"{v:.2f}" if "/" in k else f"{v:.1%}" for k, v in point[key].items()]
        rows.append([ROUTING[point["forced_routing"]], str(point["ranks"]), *shares])
    return rows


def _exchanged(points: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [["routing", "ranks", "collective", "axis", "predicted", "measured", "ratio"]]
    for point in points:
        for row in point.get("exchanged", []):
            predicted, measured = row["predicted_bytes"], row["measured_bytes"]
            rows.append([
                ROUTING[point["forced_routing"]], str(point["ranks"]), row["kind"],
                " or ".join(row["axes"]) or "all ranks", _size(predicted),
                "" if measured is None else _size(measured),
                f"{measured / predicted:.2f}" if predicted and measured is not None else "",
            ])  # fmt: skip
    return rows


def _projection_errors(errors: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [["routing", "from ranks", "ranks", "projected tokens/s", "measured", "error"]]
    return rows + [
        [ROUTING[one["forced_routing"]], str(one["from_ranks"]), str(one["ranks"]),
         f"{one['predicted']:,.0f}", f"{one['measured']:,.0f}", f"{one['error']:+.0%}"]
        for one in errors
    ]  # fmt: skip


def _size(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:,.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:,.2f} GiB"


def _with_width(point: dict[str, Any], key: str, form: str) -> str:
    width = point.get(f"{key}_half_width")
    return f"{point[key]:{form}}" + (f" ± {width:{form}}" if width else "")


def markdown(report: dict[str, Any], pictures: Sequence[str]) -> str:
    """The report as Markdown, with links to the pictures."""
    lines = ["# Scaling report", ""]
    for paragraph in introduction(report):
        lines += [paragraph, ""]
    for title, paragraph, rows in tables(report):
        head, *body = ["| " + " | ".join(row) + " |" for row in rows]
        lines += [f"## {title}", "", *([paragraph, ""] if paragraph else [])]
        lines += [head, "|" + "---|" * len(rows[0]), *body, ""]
    return "\n".join([*lines, *(f"![{name}]({name})" for name in pictures), ""])


def page(report: dict[str, Any], pictures: dict[str, str]) -> str:
    """The report as one HTML file. pictures: base64 of each PNG by name."""
    parts = ["<!doctype html><meta charset=utf-8><title>Scaling report</title>",
             "<style>body{font-family:sans-serif;max-width:75em;margin:2em auto}td,th{padding:.3em "
             ".7em;border-bottom:1px solid #ccc;text-align:right}</style>",
             "<h1>Scaling report</h1>"]  # fmt: skip
    parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in introduction(report)]
    for title, paragraph, rows in tables(report):
        parts.append(f"<h2>{title}</h2><p>{html.escape(paragraph)}</p><table>")
        for i, row in enumerate(rows):
            tag = "td" if i else "th"
            cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            parts.append(f"<tr>{cells}</tr>")
        parts.append("</table>")
    for name, data in pictures.items():
        parts.append(f'<p><img alt="{name}" src="data:image/png;base64,{data}">')
    return "\n".join(parts) + "\n"
