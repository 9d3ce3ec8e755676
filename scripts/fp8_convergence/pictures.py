"""The pictures of `scripts.fp8_convergence`: loss curves of pairs, and of ablations."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Records = list[dict[str, Any]]
Curves = dict[str, dict[str, dict[int, Records]]]
"""By model, variant and seed."""
Array = npt.NDArray[np.float64]


def draw(curves: Curves, folder: Path) -> list[Path]:
    """Draw the available curves; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    pairs = {
        model: found
        for model, found in curves.items()
        if found.get("bf16") and found.get("fp8_blockwise")
    }
    pictures = [_pairs(pairs, folder / "fp8-curves.png")] if pairs else []
    demo = pairs.get("demo", {})
    if {name for name, seeds in demo.items() if seeds} - {"bf16", "bf16_again", "fp8_blockwise"}:
        pictures.append(_ablations(demo, folder / "fp8-ablations.png"))
    return pictures


def _pairs(pairs: Curves, path: Path) -> Path:
    """Per model: both losses above, their difference below."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(pairs), figsize=(4.2 * len(pairs) + 0.6, 6), squeeze=False, sharex="col",
        height_ratios=[3, 2], layout="constrained",
    )  # fmt: skip
    for column, (model, found) in enumerate(pairs.items()):
        top, bottom = axes[:, column]
        for variant, style, width in (("bf16", "-", 2.2), ("fp8_blockwise", "--", 1.0)):
            for i, records in enumerate(found[variant].values()):
                top.plot(
                    *_smooth(records), style, lw=width, alpha=0.8, label=None if i else variant,
                    color="tab:gray" if variant == "bf16" else "tab:red",
                )  # fmt: skip
        for seed, base in found["bf16"].items():
            control = found.get("bf16_again", {}).get(seed)
            if control:
                bottom.plot(*_gap(base, control), lw=0.6, color="tab:gray")
                bottom.plot(*_validation_gap(base, control), "x", ms=4, color="tab:gray")
            if other := found["fp8_blockwise"].get(seed):
                line = bottom.plot(*_gap(base, other), lw=0.9, label=f"FP8, seed {seed}")
                bottom.plot(*_validation_gap(base, other), "o", ms=4, color=line[0].get_color())
        bottom.axhspan(-0.5, 0.5, color="tab:green", alpha=0.12)
        bottom.set_ylim(-2, 2)
        top.set_title(model)
        bottom.set_xlabel("optimizer step")
        bottom.legend(fontsize=7)
        for axis in (top, bottom):
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("training loss (nats per token)")
    axes[1, 0].set_ylabel("over bf16, percent\n(dots: validation; gray: bf16 again)")
    axes[0, 0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _ablations(found: dict[str, dict[int, Records]], path: Path) -> Path:
    """Every arithmetic's loss relative to bf16: curves of the mean, and final values by seed."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 4.2), width_ratios=[2, 1], layout="constrained"
    )
    names = [name for name, seeds in found.items() if seeds and name != "bf16"]
    for place, name in enumerate(names):
        pairs = [(found["bf16"][seed], records) for seed, records in found[name].items()]
        gaps = [_gap(base, other) for base, other in pairs]
        left.plot(gaps[0][0], np.mean([gap for _, gap in gaps], axis=0), lw=1, label=name)
        final = [_validation_gap(*pair)[1][-1] for pair in pairs]
        right.plot([place] * len(final), final, "o", color=f"C{place}")
    right.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    right.set_title("final validation loss, by seed", fontsize=9)
    left.set_title("training loss, mean over seeds", fontsize=9)
    left.set_ylabel("over bf16, percent")
    left.set_xlabel("optimizer step")
    left.legend(fontsize=8)
    for axis in (left, right):
        axis.axhline(0, color="black", lw=0.6)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _losses(records: Records) -> tuple[Array, Array]:
    steps = np.array([r["step"] for r in records], dtype=float)
    return steps, np.array([r["loss"] for r in records])


def _smooth(records: Records) -> tuple[Array, Array]:
    """The mean over a fiftieth of the run before each step."""
    steps, losses = _losses(records)
    window = max(len(steps) // 50, 1)
    sums = np.cumsum(np.insert(losses, 0, 0.0))
    return steps[window - 1 :], (sums[window:] - sums[:-window]) / window


def _gap(base: Records, other: Records) -> tuple[Array, Array]:
    steps, losses = _smooth(other)
    return steps, 100 * (losses / _smooth(base)[1] - 1)


def _validation_gap(base: Records, other: Records) -> tuple[Array, Array]:
    steps, losses = _validations(other)
    return steps, 100 * (losses / _validations(base)[1] - 1)


def _validations(records: Records) -> tuple[Array, Array]:
    held_out = [r for r in records if "validation_loss" in r]
    steps = np.array([r["step"] for r in held_out], dtype=float)
    return steps, np.array([r["validation_loss"] for r in held_out])
