"""Statistics of each source of a dataset, and a picture of the lengths of its documents."""

from pathlib import Path
from typing import Any

import numpy as np

from train.data.documents import shown
from train.prepare.plan import Plan
from train.prepare.reading import REJECTIONS
from train.prepare.selection import EQUAL, NEARLY_EQUAL, TRAIN, VALIDATION, Decisions

_QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99}


def source_statistics(
    plan: Plan, scans: list[Any], decisions: Decisions, encoded: list[Any], work: Path
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Per source what was read, dropped and kept, and the lengths in tokens of its documents.

    scans, encoded: counts of the units.
    """
    entries, all_lengths = [], []
    for number, name in enumerate(plan.options.sources):
        units = [n for n, unit in enumerate(plan.units) if unit.source == number]
        parts = [np.empty(0, np.uint8), *(decisions.of_unit(n) for n in units)]
        values = np.concatenate(parts)
        counts = np.bincount(values, minlength=5)
        lengths = [np.empty(0, np.int32)] + [
            np.fromfile(work / "encode" / f"{n}.{split}.lengths.bin", np.int32)
            for n in units
            for split in ("train", "validation")
        ]
        joined = np.concatenate(lengths)
        entries.append(
            {
                "source": shown(name),
                "documents": sum(scans[n]["documents"] for n in units),
                **{why: sum(scans[n]["rejected"][why] for n in units) for why in REJECTIONS},
                "exact_duplicates": int(counts[EQUAL]),
                "near_duplicates": int(counts[NEARLY_EQUAL]),
                "train": _totals(encoded, units, "train", int(counts[TRAIN])),
                "validation": _totals(encoded, units, "validation", int(counts[VALIDATION])),
                "tokens_per_document": _summary(joined),
            }
        )
        all_lengths.append(joined)
    return entries, all_lengths


def _totals(encoded: list[Any], units: list[int], split: str, documents: int) -> dict[str, int]:
    sums = {key: sum(encoded[n][split][key] for n in units) for key in ("tokens", "bytes")}
    assert documents == sum(encoded[n][split]["documents"] for n in units)
    return {"documents": documents, **sums}


def _summary(lengths: np.ndarray) -> dict[str, float]:
    if not len(lengths):
        return {}
    found = {name: float(np.quantile(lengths, q)) for name, q in _QUANTILES.items()}
    return {"mean": float(lengths.mean()), **found, "longest": int(lengths.max())}


def describe(entries: list[dict[str, Any]]) -> list[str]:
    """A line per source."""
    lines = []
    for entry in entries:
        kept = {key: entry["train"][key] + entry["validation"][key] for key in entry["train"]}
        dropped = [f"{entry[why]:,} {why.replace('_', ' ')}" for why in REJECTIONS if entry[why]]
        for key in ("exact_duplicates", "near_duplicates"):
            dropped += [f"{entry[key]:,} {key.replace('_', ' ')}"] if entry[key] else []
        lines.append(
            f"{entry['source']}: {entry['documents']:,} documents, dropped "
            f"{', '.join(dropped) or 'none'}; kept {kept['documents']:,} with "
            f"{kept['tokens']:,} tokens of {kept['bytes']:,} bytes "
            f"({kept['bytes'] / max(kept['tokens'], 1):.2f} bytes per token)"
        )
    return lines


def draw_lengths(entries: list[dict[str, Any]], lengths: list[np.ndarray], path: Path) -> None:
    """Draw how many documents and how many tokens are in documents of each length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, layout="tight")
    longest = max((int(part.max(initial=1)) for part in lengths), default=1)
    bins = np.geomspace(1, longest + 1, 60)
    for entry, part in zip(entries, lengths, strict=True):
        label = shown(entry["source"], 40).lstrip("_")  # matplotlib hides names that begin with _
        above.hist(part, bins, histtype="step", label=label)
        below.hist(part, bins, weights=part.astype(float), histtype="step", label=label)
    below.set_xscale("log")
    below.set_xlabel("tokens of the document")
    above.set_ylabel("documents")
    below.set_ylabel("tokens in them")
    above.legend(fontsize="small")
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)
