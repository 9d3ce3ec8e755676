"""The picture of `scripts.bench_growth`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

Curve = Sequence[tuple[int, float, float]]
"""Size, milliseconds per token and GiB of each point."""


def draw(curves: Mapping[str, Curve], path: Path) -> Path:
    """Per axis: time per token above, memory below, both with logarithmic scales."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(curves), figsize=(2.6 * len(curves) + 0.6, 5), squeeze=False, sharex="col",
        sharey="row", layout="constrained",
    )  # fmt: skip
    for column, (name, points) in enumerate(curves.items()):
        sizes, milliseconds, memory = zip(*points, strict=True)
        for row, values in enumerate((milliseconds, memory)):
            axis = axes[row, column]
            axis.plot(sizes, values, "o-")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.yaxis.set_major_formatter("{x:.3g}")
        axes[0, column].set_title(name)
    axes[0, 0].set_ylabel("milliseconds per token")
    axes[1, 0].set_ylabel("GiB")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
