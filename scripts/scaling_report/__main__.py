"""`python -m scripts.scaling_report RUN... --out FOLDER`: scaling efficiency of measured runs.

Writes report.md, report.html (with its pictures inside), report.json and PNGs. Every figure is
measured; runs that differ in more than their mesh, routing and seed are refused.
"""

import base64
import html
import json
import sys
from pathlib import Path
from typing import Any

from configs.command_line import CommandParser
from configs.errors import UserError
from scripts.scaling_report.figures import report_of
from scripts.scaling_report.runs import read_run

_PICTURES = ("speed.png", "breakdown.png")


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = CommandParser(prog="python -m scripts.scaling_report", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--note", default="", help="a sentence about the machine, printed first")
    options = parser.parse_args(arguments)
    try:
        report = report_of([read_run(folder) for folder in options.runs])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report["note"] = options.note
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    _draw(out, report)
    (out / "report.md").write_text(_markdown(report))
    (out / "report.html").write_text(_page(out, report))
    print(f"wrote {out / 'report.md'}, report.html, report.json, {', '.join(_PICTURES)}")
    return 0


def tables(report: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Titles and rows, the first row of each table being its header."""
    speed = [["routing", "ranks", "mesh", "repeats", "tokens/s", "per rank", "efficiency",
              "step, s (median, largest)", "data wait", "memory, GiB", "max / mean load",
              "restarts", *["MFU"] * ("mfu" in report["points"][0])]]  # fmt: skip
    parts = [["routing", "ranks"]]
    for point in report["points"]:
        routing = "forced" if point["forced_routing"] else "natural"
        mesh = ", ".join(f"{axis} {size}" for axis, size in point["mesh"].items()) or "one rank"
        speed.append([
            routing, str(point["ranks"]), mesh, str(point["repeats"]),
            _with_width(point, "tokens_per_s", ",.0f"), f"{point['tokens_per_s_per_rank']:,.0f}",
            _with_width(point, "efficiency", ".2f"),
            f"{point['step_s_median']:.3f}, {point['step_s_largest']:.3f}",
            f"{point['data_share']:.1%}", f"{point['memory_gib']:.2f}",
            f"{point['imbalance']:.2f}", str(point["restarts"]),
            *([f"{point['mfu']:.1%}"] if "mfu" in point else []),
        ])  # fmt: skip
        shares = point.get("breakdown", {})
        if shares:
            parts[0] = ["routing", "ranks", *shares]
            parts.append(
                [routing, str(point["ranks"]), *(_share(*item) for item in shares.items())]
            )
    found = [("Speed", speed)]
    return found + ([("Where a profiled step spends its time", parts)] if parts[1:] else [])


def _share(name: str, value: float) -> str:
    return f"{value:.2f}" if "/" in name else f"{value:.1%}"


def _with_width(point: dict[str, Any], key: str, form: str) -> str:
    width = point[f"{key}_half_width"]
    return f"{point[key]:{form}}" + (f" ± {width:{form}}" if width else "")


def _introduction(report: dict[str, Any]) -> list[str]:
    what = {"strong": "the same global batch", "weak": "a global batch that grows with the ranks"}
    return [
        *filter(None, [report["note"]]),
        f"All points are measured, with {what[report['scaling']]} ({report['scaling']} scaling) "
        f"on {report['device']}; about {report['model_parameters']:,} parameters, sequences of "
        f"{report['tokens_per_sequence']} tokens.",
        "Efficiency: tokens/s per rank over those of the fewest ranks with the same routing. ±: 95 "
        "percent interval of the mean of the repeats (Student's t); without it there was one. "
        "Forced routing sends tokens round-robin: a benchmark, the router learns nothing.",
    ]


def _markdown(report: dict[str, Any]) -> str:
    lines = ["# Scaling report", ""]
    for paragraph in _introduction(report):
        lines += [paragraph, ""]
    for title, rows in tables(report):
        head, *body = ["| " + " | ".join(row) + " |" for row in rows]
        lines += [f"## {title}", "", head, "|" + "---|" * len(rows[0]), *body, ""]
    return "\n".join([*lines, *(f"![{name}]({name})" for name in _PICTURES), ""])


def _page(out: Path, report: dict[str, Any]) -> str:
    parts = ["<!doctype html><meta charset=utf-8><title>Scaling report</title>",
             "<style>body{font-family:sans-serif;max-width:75em;margin:2em auto}td,th{padding:.3em "
             ".7em;border-bottom:1px solid #ccc;text-align:right}</style>",
             "<h1>Scaling report</h1>"]  # fmt: skip
    parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in _introduction(report)]
    for title, rows in tables(report):
        parts.append(f"<h2>{title}</h2><table>")
        for i, row in enumerate(rows):
            tag = "td" if i else "th"
            cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            parts.append(f"<tr>{cells}</tr>")
        parts.append("</table>")
    for name in _PICTURES:
        data = base64.b64encode((out / name).read_bytes()).decode()
        parts.append(f'<p><img alt="{name}" src="data:image/png;base64,{data}">')
    return "\n".join(parts) + "\n"


def _draw(out: Path, report: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    points = report["points"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for forced, name in ((False, "natural routing"), (True, "forced routing")):
        some = [point for point in points if point["forced_routing"] is forced]
        ranks = [point["ranks"] for point in some]
        for axis, key in ((left, "tokens_per_s"), (right, "efficiency")):
            widths = [point[f"{key}_half_width"] or 0.0 for point in some]
            axis.errorbar(ranks, [p[key] for p in some], widths, fmt="o-", capsize=3, label=name)
    for axis, label in ((left, "tokens/s"), (right, f"{report['scaling']} efficiency")):
        axis.set_xlabel("ranks (measured)")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(out / _PICTURES[0], dpi=110)
    pyplot.close(figure)
    figure, axis = pyplot.subplots(figsize=(10, 4), layout="constrained")
    shown = [point for point in points if "breakdown" in point]
    names = [f"{p['ranks']}\n{'forced' if p['forced_routing'] else 'natural'}" for p in shown]
    bottoms = [0.0] * len(shown)
    for part in ("forward", "backward", "optimizer"):
        heights = [point["breakdown"][part] for point in shown]
        axis.bar(names, heights, bottom=bottoms, label=part)
        bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    axis.set_ylabel("share of a profiled step")
    axis.legend()
    figure.savefig(out / _PICTURES[1], dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
