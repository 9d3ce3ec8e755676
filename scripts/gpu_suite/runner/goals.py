"""The goals of the summary: what the measurements are for. Figures are those of an H200."""

import re
from collections.abc import Callable
from typing import Any

from scripts.gpu_suite.runner.summary import Goal

_Rows = list[dict[str, Any]]


def tflops(pattern: str, name: str = "ours") -> Callable[[_Rows], float | None]:
    """The least TFLOP/s of the rows whose case matches; the better one of ours and ours in
    Gluon."""

    def figure(rows: _Rows) -> float | None:
        found = []
        for row in _matching(rows, pattern):
            times = [ms for key, ms in row["milliseconds"].items() if _is(key, name)]
            if times and row["flops"]:
                found.append(row["flops"] / min(times) / 1e9)
        return min(found, default=None)

    return figure


def against(pattern: str, peer: str, name: str = "ours") -> Callable[[_Rows], float | None]:
    """The least speed of ours as a multiple of a peer's."""

    def figure(rows: _Rows) -> float | None:
        found = []
        for row in _matching(rows, pattern):
            times = [ms for key, ms in row["milliseconds"].items() if _is(key, name)]
            if times and peer in row["milliseconds"]:
                found.append(row["milliseconds"][peer] / min(times))
        return min(found, default=None)

    return figure


def largest(pattern: str, key: str) -> Callable[[_Rows], float | None]:
    """The largest value of a field, which may be a list."""

    def figure(rows: _Rows) -> float | None:
        found: list[float] = []
        for row in _matching(rows, pattern):
            value = row.get(key)
            found += value if isinstance(value, list) else [] if value is None else [value]
        return max(found, default=None)

    return figure


def _matching(rows: _Rows, pattern: str) -> _Rows:
    return [row for row in rows if re.search(pattern, row["case"])]


def _is(key: str, name: str) -> bool:
    return key in (name, f"{name} in Gluon")


GOALS = [
    Goal("training step, FP8 against bf16", "training", against("", "bf16"), 1.25, "x"),
    Goal("training step, copies to the host", "training", largest("", "host_copies"), 7, "", True),
    Goal("dense FP8 nt, 4096^3 and larger squares", "gemm",
         tflops(r"nt (4096|8192|16384)x\1x\1$"), 1000, " TF/s"),
    Goal("dense FP8 nt against cuBLASLt blockwise, every shape", "gemm",
         against("^nt", "cuBLASLt 1x128 128x128"), 1.0, "x"),
    Goal("dense FP8 tn, every shape", "gemm", tflops("^tn"), 1000, " TF/s"),
    Goal("grouped FP8 forward, balanced, K >= 2048", "grouped",
         tflops(r"^nt fp8 E\d+ \d+x\d+x(2048|4096|7168|14336) balanced"), 1000, " TF/s"),
    Goal("grouped FP8 dgrad, balanced", "grouped", tflops("^nn fp8 .* balanced"), 1000, " TF/s"),
    Goal("grouped FP8 wgrad, balanced", "grouped", tflops("^tn fp8 .* balanced"), 1050, " TF/s"),
    Goal("grouped bf16 forward against torch._grouped_mm", "grouped",
         against("^nt bf16", "torch._grouped_mm"), 1.0, "x"),
    Goal("MoE layers, copies to the host", "moe", largest("forward", "host_copies"), 0, "", True),
    Goal("rows: gather and combine against a copy", "moe",
         against(r"^(gather_rows \d|combine_rows)", "copy"), 0.85, "x"),
    Goal("attention in documents against a dense mask, 32k", "attention",
         against("32768", "SDPA, dense mask"), 1.0, "x"),
    Goal("decodes over pages against a copy, 64 x 8192 keys", "serve",
         against("64 x 8192 keys", "copy"), 0.8, "x"),
    Goal("quantization against a copy", "quantize", against("quantize_1x128 ", "copy"), 0.85, "x"),
    Goal("norm, rotation, loss against a copy", "elementwise", against("", "copy"), 0.7, "x"),
]  # fmt: skip
"""In the order of the sections."""
