"""What is reported of one run of a workload."""

from serve.bench.client import Answer

Row = dict[str, object]


def percentiles(values: list[float]) -> str:
    """Median, 90 and 99 percent in milliseconds."""
    if not values:
        return "-"
    ranked = sorted(values)
    at = (ranked[min(int(len(ranked) * q), len(ranked) - 1)] for q in (0.5, 0.9, 0.99))
    return " / ".join(f"{1e3 * value:.1f}" for value in at)


def measured(seconds: float, answers: list[Answer]) -> Row:
    """Rates in tokens per second, latencies in milliseconds, the cached share of the prompts."""
    total_in = sum(answer.prompt_tokens for answer in answers)
    gaps = [b - a for x in answers for a, b in zip(x.pieces, x.pieces[1:], strict=False)]
    per_token = [
        (x.pieces[-1] - x.pieces[0]) / (x.output_tokens - 1)
        for x in answers if len(x.pieces) > 1 and x.output_tokens > 1
    ]  # fmt: skip
    return {
        "out tok/s": round(sum(answer.output_tokens for answer in answers) / seconds, 1),
        "in tok/s": round(total_in / seconds, 1),
        "TTFT ms p50/p90/p99": percentiles([x.pieces[0] - x.asked for x in answers]),
        "TPOT ms p50/p90/p99": percentiles(per_token),
        "ITL ms p50/p90/p99": percentiles(gaps),
        "hit rate": round(sum(x.cached_tokens for x in answers) / max(total_in, 1), 3),
    }


def table(rows: list[Row]) -> str:
    """Markdown."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([str(row[head]) for head in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
