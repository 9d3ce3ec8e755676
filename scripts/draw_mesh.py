"""`python -m scripts.draw_mesh FILE.toml OUT.png [--ranks N] [--section.key=value]`: draws a mesh.

One column per rank, one row per type of data; equal colors in a row are equal parts.
"""

import sys
from pathlib import Path

from configs.errors import UserError
from configs.loader import load, parse_arguments
from configs.parallel_dims import ParallelDims, default_world, resolve
from configs.schema import JobConfig

_MOST_RANKS = 64


def parts(config: JobConfig, parallel_dims: ParallelDims) -> list[tuple[str, list[int], list[str]]]:
    """Rows (title, part of every rank, name of that part)."""
    d, n = parallel_dims, config.model.moe.n_experts // parallel_dims.ep
    heads = config.model.attention.n_heads // d.tp
    ranks = range(d.world)
    tp, ep = [r % d.tp for r in ranks], [r // d.etp % d.ep for r in ranks]
    dense = [r // d.tp % d.dp_shard for r in ranks]
    etp, efsdp = [r % d.etp for r in ranks], [r // (d.etp * d.ep) % d.efsdp for r in ranks]
    data = [d.data_rank(r) for r in ranks]
    return [
        ("sequences (data)", data, [f"batch {i}" for i in data]),
        ("heads, widths, words (tp)", tp, [f"heads {i * heads}-{(i + 1) * heads - 1}" for i in tp]),
        ("of these, shard (dp_shard)", dense, [f"{i + 1} of {d.dp_shard}" for i in dense]),
        ("experts (ep)", ep, [f"{i * n}-{(i + 1) * n - 1}" if n > 1 else f"{i}" for i in ep]),
        ("of their width (etp)", etp, [f"{i + 1} of {d.etp}" for i in etp]),
        ("of these, shard (efsdp)", efsdp, [f"{i + 1} of {d.efsdp}" for i in efsdp]),
    ]


def draw(config: JobConfig, parallel_dims: ParallelDims, picture: Path) -> None:
    """Draw the ranks of a mesh. Raises UserError if they are too many for a picture."""
    if parallel_dims.world > _MOST_RANKS:
        raise UserError(f"{parallel_dims.world} ranks: a picture shows at most {_MOST_RANKS}")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    rows = parts(config, parallel_dims)
    width = max(1.3, 10 / parallel_dims.world)
    figure, axis = pyplot.subplots(
        figsize=(width * parallel_dims.world + 2.5, 0.6 * len(rows) + 1), layout="constrained"
    )
    colours = pyplot.get_cmap("Set3")
    for y, (_, numbers, texts) in enumerate(rows):
        for rank, (number, text) in enumerate(zip(numbers, texts, strict=True)):
            colour = colours(number % colours.N)
            axis.add_patch(Rectangle((rank + 0.03, y + 0.06), 0.94, 0.88, color=colour))
            axis.text(rank + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8)
    axis.set_xlim(0, parallel_dims.world)
    axis.set_ylim(len(rows), 0)
    axis.set_xticks([r + 0.5 for r in range(parallel_dims.world)])
    axis.set_xticklabels([f"rank {r}" for r in range(parallel_dims.world)])
    axis.set_yticks([y + 0.5 for y in range(len(rows))], [title for title, _, _ in rows])
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    try:
        pictures = [a for a in arguments if a.endswith(".png") and not a.startswith("--")]
        if len(pictures) != 1:
            raise UserError("name one picture, such as mesh.png")
        file, overrides, world = parse_arguments([a for a in arguments if a not in pictures])
        config = load(file, overrides)
        draw(config, resolve(config, world or default_world(config)), Path(pictures[0]))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
