"""All sections, most valuable first."""

from scripts.gpu_suite import (
    attention,
    elementwise,
    gemm,
    gluon,
    grouped,
    layers,
    moe,
    quantize,
    sanitizer,
    serve,
    training,
)
from scripts.gpu_suite.runner.section import Section

SECTIONS = [
    Section("training", training.check, training.measure, measure_s=150),
    Section("gluon", gluon.check),
    Section("gemm", gemm.check, gemm.measure, shares=4, requires=("gluon",)),
    Section("grouped", grouped.check, grouped.measure, shares=4),
    Section("moe", moe.check, moe.measure, shares=2),
    Section("attention", attention.check, attention.measure, shares=0),
    Section("serve", serve.check, serve.measure),
    Section("quantize", quantize.check, quantize.measure, 60, 60),
    Section("layers", layers.check, layers.measure, 60, 60),
    Section("elementwise", elementwise.check, elementwise.measure, 60, 60),
    Section("sanitizer", sanitizer.check, check_s=180, is_alone=True),
]
