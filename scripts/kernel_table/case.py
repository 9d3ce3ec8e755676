"""A kernel to be compiled, and the targets."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from scripts.kernel_table.offline import Build, offline

TARGETS: dict[str, tuple[str, int | str]] = {
    "sm_90": ("cuda", 90),
    "sm_100": ("cuda", 100),
    "gfx942": ("hip", "gfx942"),
    "gfx950": ("hip", "gfx950"),
}
TENSOR_CORES = {
    "fp8": {"sm_90": "QGMMA", "sm_100": "UTCQMMA", "gfx942": "MFMA", "gfx950": "MFMA"},
    "bf16": {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA", "gfx950": "MFMA"},
    "bf16, few rows": {"sm_90": "HMMA", "sm_100": "HMMA", "gfx942": "MFMA", "gfx950": "MFMA"},
}
SIZE = 4096


@dataclass(frozen=True)
class Case:
    """One configuration of one kernel."""

    name: str
    launch: Callable[..., object]
    """Launches the kernel on operands in this FP8 type."""
    multiplies: bool = False
    """Whether its code must use tensor cores."""
    everyday: bool = True
    """Whether continuous integration compiles it; the others differ from one of these in one
    type."""
    targets: tuple[str, ...] = tuple(TARGETS)
    """The targets that it supports."""
    cores: str = "fp8"
    """The type that its tensor cores multiply."""
    index: int = -1
    """Which of the kernels that it launches."""
    descriptors: bool = True
    """Whether code with tensor cores must use TMA if the target has it."""


def fp8_of(target: str) -> torch.dtype:
    """The e4m3 of a target."""
    return torch.float8_e4m3fnuz if target == "gfx942" else torch.float8_e4m3fn


def build(case: Case, target: str) -> Build:
    """Compile one case for one target."""
    with offline(*TARGETS[target]) as builds:
        case.launch(fp8_of(target))
    return builds[case.index]  # a grouped product first launches the schedule of its tiles
