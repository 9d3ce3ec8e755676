"""Pictures of a run, drawn from its own records: loss.png and experts.png."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from train.report.metrics import (
    EXPERT_LOAD,
    EXPERTS_PICTURE,
    FORCED_BALANCE,
    LOSS_PICTURE,
    METRICS,
    read_lines,
)


def draw(folder: Path) -> list[Path]:
    """Draw both pictures of the run in `folder`; returns the files."""
    # a notebook's backend, or one that is not installed, is an error
    os.environ["MPLBACKEND"] = "agg"
    import matplotlib

    matplotlib.use("agg")
    loads = [record for record in read_lines(folder / EXPERT_LOAD) if record["load"]]
    pictures = [_loss(folder)]
    if loads:
        shape = np.shape(loads[-1]["load"])  # a damaged line may have another shape
        loads = [record for record in loads if np.shape(record["load"]) == shape]
        pictures.append(_experts(folder, loads))
    return pictures


def _margins(width: float, height: float, right: float) -> dict[str, float]:
    """Borders of the axes as shares of a figure of `width` by `height` inches, `right` inches wide
    at the right. Fixed ones take half the time of a computed layout."""
    return {
        "left": 0.9 / width, "right": 1 - right / width,
        "bottom": 0.6 / height, "top": 1 - 0.35 / height,
    }  # fmt: skip


def _loss(folder: Path) -> Path:
    from matplotlib import pyplot

    records = read_lines(folder / METRICS)
    steps = [r["step"] for r in records]
    figure, (top, bottom) = pyplot.subplots(
        2,
        1,
        figsize=(8, 6),
        sharex=True,
        height_ratios=[3, 1],
        gridspec_kw=_margins(8, 6, right=0.2),
    )
    top.plot(steps, [r["loss"] for r in records], lw=0.8, label="training")
    if any("force_balance" in r for r in records):
        top.set_title(FORCED_BALANCE, fontsize=8)
    held_out = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
    if held_out:
        top.plot(
            *zip(*held_out, strict=True), "o-", label=f"validation, last {held_out[-1][1]:.3f}"
        )
    top.set_ylabel("loss (nats per token)")
    top.grid(alpha=0.3)
    top.legend()
    bottom.plot(steps, [r["lr"] for r in records], color="tab:green")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    bottom.grid(alpha=0.3)
    path = folder / LOSS_PICTURE
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _experts(folder: Path, records: list[dict[str, Any]], columns: int = 200) -> Path:
    """Load of every expert over time, one panel per layer; 1 is a fair share."""
    from matplotlib import pyplot

    load_SLE = np.array([r["load"] for r in records], dtype=float)
    steps = [r["step"] for r in records]
    spans = np.array_split(np.arange(len(steps)), min(columns, len(steps)))
    mean_CLE = np.stack([load_SLE[span].mean(0) for span in spans])
    share_CLE = mean_CLE / mean_CLE.mean(-1, keepdims=True)
    n_layers = share_CLE.shape[1]
    across = min(n_layers, 4)
    down = -(-n_layers // across)
    width, height = 3.2 * across + 1, 2.4 * down + 0.6
    figure, axes = pyplot.subplots(
        down, across, figsize=(width, height), squeeze=False, sharex=True, sharey=True,
        gridspec_kw=_margins(width, height, right=1.0) | {"wspace": 0.08, "hspace": 0.2},
    )  # fmt: skip
    for layer, axis in enumerate(axes.flat):
        if layer >= n_layers:
            axis.axis("off")
            continue
        image = axis.imshow(
            share_CLE[:, layer].T, aspect="auto", origin="lower", cmap="RdBu_r", vmin=0, vmax=2,
            extent=(steps[0] - 0.5, steps[-1] + 0.5, -0.5, share_CLE.shape[2] - 0.5),
        )  # fmt: skip
        axis.set_title(f"MoE layer {layer}", fontsize=9)
    place = _margins(width, height, right=1.0)
    bar = (1 - 0.8 / width, place["bottom"], 0.15 / width, place["top"] - place["bottom"])
    figure.colorbar(image, cax=figure.add_axes(bar), label="load / fair share")
    figure.supxlabel("optimizer step")
    figure.supylabel("expert")
    path = folder / EXPERTS_PICTURE
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
