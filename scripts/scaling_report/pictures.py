"""The pictures of a report."""

from pathlib import Path
from typing import Any

from scripts.scaling_report.figures import ROUTING

SPEED, BREAKDOWN = "speed.png", "breakdown.png"
_HATCHES = {"hidden": "///", "exposed": ""}


def draw(out: Path, report: dict[str, Any]) -> list[str]:
    """Write the PNGs into a folder; returns their names."""
    import matplotlib

    matplotlib.use("agg")
    _speed(out / SPEED, report)
    shown = [point for point in report["points"] if "breakdown" in point]
    if not shown:
        return [SPEED]
    _breakdown(out / BREAKDOWN, shown)
    return [SPEED, BREAKDOWN]


def _speed(path: Path, report: dict[str, Any]) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for number, (forced, name) in enumerate(ROUTING.items()):
        some = [point for point in report["points"] if point["forced_routing"] is forced]
        measured = [point for point in some if point["kind"] == "measured"]
        projected = [*measured[-1:], *some[len(measured) :]]
        for axis, key in zip(axes, ("tokens_per_s", "efficiency"), strict=True):
            if not measured:
                continue
            ranks = [point["ranks"] for point in measured]
            widths = [point[f"{key}_half_width"] or 0.0 for point in measured]
            axis.errorbar(
                ranks, [p[key] for p in measured], widths, fmt=f"C{number}o-", capsize=3,
                label=f"{name} routing, measured",
            )  # fmt: skip
            if projected[1:]:
                axis.plot(
                    [p["ranks"] for p in projected], [p[key] for p in projected],
                    f"C{number}--", marker="o", mfc="white", zorder=0,
                    label=f"{name} routing, projected",
                )  # fmt: skip
    for axis, label in zip(axes, ("tokens/s", f"{report['scaling']} efficiency"), strict=True):
        axis.set_xlabel("ranks")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _breakdown(path: Path, points: list[dict[str, Any]]) -> None:
    """The parts of a step; and the communication at the same time, hidden and exposed."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4), layout="constrained")
    kinds = [f"{kind}, {how}" for kind in ("dispatch", "FSDP", "other") for how in _HATCHES]
    places = range(len(points))
    for axis, parts in zip(axes, (("forward", "backward", "optimizer"), kinds), strict=True):
        bottoms = [0.0] * len(points)
        for i, part in enumerate(parts):
            _, _, how = part.partition(", ")
            heights = [point["breakdown"][part] for point in points]
            color = f"C{i // 2 + 3}" if how else f"C{i}"
            axis.bar(
                places, heights, bottom=bottoms, label=part, color=color, edgecolor="white",
                hatch=_HATCHES.get(how),
            )  # fmt: skip
            bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
        axis.set_xticks(places, [f"{p['ranks']}\n{ROUTING[p['forced_routing']]}" for p in points])
        axis.set_xlabel("ranks, routing")
        axis.legend(fontsize="small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes[0].set_ylabel("share of a profiled step")
    axes[1].set_ylabel("communication, share of the step")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
