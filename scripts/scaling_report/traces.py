"""Where the time of a profiled step is spent, from the trace of one rank.

Communication is the union of the spans of gloo, or of NCCL's kernels. It is *hidden* while the rank
also computes (operations of the main thread on a CPU, other kernels on a GPU), otherwise *exposed*.
The trace itself slows a step down, so shares are reported, and no speed is computed from it.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from parallel.gloo import SPAN

Span = tuple[float, float]
_KINDS = {
    "all_to_all": "dispatch", "alltoall": "dispatch", "all_gather": "FSDP", "allgather": "FSDP",
    "reduce_scatter": "FSDP", "reducescatter": "FSDP",
}  # fmt: skip


ALL_TO_ALL = "c10d::alltoall_base_"
_SCATTER = "_c10d_functional::reduce_scatter_tensor"


def union(spans: Iterable[Span]) -> list[Span]:
    """Disjoint spans that cover the same time, in order."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def length(spans: Iterable[Span]) -> float:
    """Time that the spans cover together."""
    return sum(end - begin for begin, end in union(spans))


def overlap(one: Iterable[Span], other: Iterable[Span]) -> float:
    """Time that both cover."""
    one, other = list(one), list(other)
    return length(one) + length(other) - length([*one, *other])


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events with a duration. Raises ValueError for a file that is no trace of a step."""
    events = [e for e in json.loads(path.read_bytes())["traceEvents"] if e.get("ph") == "X"]
    if not any(e["name"].startswith("Optimizer.step") for e in events):
        raise ValueError(f"{path.name}: no optimizer step in it")
    return events


def breakdown(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Share of the step per part; `forward` is what remains. Communication overlaps with the
    others, so its rows are not part of the sum. events: of `read_trace`."""
    optimizer = [e for e in events if e["name"].startswith("Optimizer.step")]
    thread = optimizer[0]["tid"]
    main = [e for e in events if e["tid"] == thread and e.get("cat") == "cpu_op"]
    total = _extent([*main, *optimizer])
    if not total > 0:
        raise ValueError("its step has no duration")
    # on CUDA it has a thread of its own
    backward = length(_span(e) for e in events if e["name"].startswith("autograd::engine"))
    step = length(map(_span, optimizer))
    kernels = [e for e in events if e.get("cat") == "kernel"]
    computing = [_span(e) for e in kernels if "nccl" not in e["name"].lower()] if kernels else [
        _span(e) for e in main if e["name"].startswith(("aten::", "phalanx::"))
    ]  # fmt: skip
    # gloo computes a reduce-scatter as an all-reduce of its input, `parallel.gloo` as an all-to-all
    scattered = {shape for e in events if e["name"] == _SCATTER and (shape := _shape(e, 0))}
    exchanged = {_shape(event, 1) for event, _ in reduce_scatters(events)}
    sent = {"dispatch": list[Span](), "FSDP": list[Span](), "other": list[Span]()}
    for event in events:
        name = event["name"].lower()
        if name.startswith("gloo:") or (event.get("cat") == "kernel" and "nccl" in name):
            kinds = [kind for word, kind in _KINDS.items() if word in name]
            of_fsdp = {"gloo:all_reduce": scattered, "gloo:all_to_all": exchanged}
            if _shape(event, 0) in of_fsdp.get(name, ()):
                kinds = ["FSDP"]
            sent[kinds[0] if kinds else "other"].append(_span(event))
    parts = {
        "forward": total - backward - step,
        "backward": backward,
        "optimizer": step,
    }
    for kind, spans in sent.items():
        hidden = overlap(spans, computing)
        parts[f"{kind}, hidden"] = hidden
        parts[f"{kind}, exposed"] = length(spans) - hidden
    return {part: time / total for part, time in parts.items()}


def reduce_scatters(events: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    """The all-to-alls that are reduce-scatters (`parallel.gloo`), and their number of ranks."""
    spans = [
        (e["tid"], *_span(e), int(e["name"].removeprefix(SPAN)))
        for e in events
        if e["name"].startswith(SPAN)
    ]
    return [
        (event, ranks)
        for event in events
        if event["name"] == ALL_TO_ALL
        for thread, begin, end, ranks in spans
        if event["tid"] == thread and begin <= event["ts"] < end
    ]


def _shape(event: dict[str, Any], place: int) -> str:
    """The shape of an argument; empty if the trace does not have it."""
    shapes = event.get("args", {}).get("Input Dims", [])
    return str(shapes[place]) if len(shapes) > place else ""


def _span(event: dict[str, Any]) -> Span:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def _extent(events: list[dict[str, Any]]) -> float:
    spans = [_span(event) for event in events]
    return max(end for _, end in spans) - min(begin for begin, _ in spans)
