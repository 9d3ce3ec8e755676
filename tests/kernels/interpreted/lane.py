"""Pytest plugin for Triton's interpreter: `interpreted_*.py` run with it.

Uninitialized memory is filled with NaN throughout.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton
from torch import Tensor

from kernels import device
from kernels.fp8 import Quantized
from kernels.gemm.gemm_fp8_triton import Target
from tests.kernels.interpreted import interpreter

assert triton.knobs.runtime.interpret, "to be run with TRITON_INTERPRET=1"
interpreter.install()

POINTERS = Target(n_sm=3, shared_bytes=232448, amd=False, descriptors=False)
DESCRIPTORS = Target(n_sm=3, shared_bytes=232448, amd=False, descriptors=True)
FP8 = [torch.float8_e4m3fn]
if triton.__version__ >= "3.9":  # the interpreter of 3.6 has no fnuz types
    FP8.append(torch.float8_e4m3fnuz)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--few", action="store_true", help="of every parameter all values")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--few`, keep for each function few items that have all values of those that are not
    slow."""
    if not config.option.few:
        return
    left: dict[str, list[pytest.Function]] = {}
    for item in items:
        assert isinstance(item, pytest.Function)
        if item.get_closest_marker("slow"):
            continue
        left.setdefault(item.originalname, []).append(item)
    items[:] = [item for each in left.values() for item in _few(each)]


def _few(items: list[pytest.Function]) -> list[pytest.Function]:
    """Of those with most missing values the one with most missing pairs of values, until none is
    missing."""

    def values(item: pytest.Function) -> set[Any]:
        spec = getattr(item, "callspec", None)
        return {(key, repr(value)) for key, value in spec.params.items()} if spec else {()}

    def pairs(item: pytest.Function) -> set[Any]:
        return set(itertools.combinations(sorted(values(item)), 2))

    chosen = list[pytest.Function]()
    missing, unpaired = (set().union(*map(of, items)) for of in (values, pairs))
    while missing:
        best = max(items, key=lambda i: (len(values(i) & missing), len(pairs(i) & unpaired)))
        chosen.append(best)
        missing -= values(best)
        unpaired -= pairs(best)
    return chosen


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        interpreter.poison(patch)
        yield


def bits(x: Tensor) -> Tensor:
    """The bits of x, with all NaNs made equal."""
    codes = x.contiguous().view({1: torch.uint8, 4: torch.int32}[x.element_size()])
    return codes.masked_fill(x.float().isnan(), 127)


def assert_same_bits(ours: Quantized, reference: Quantized) -> None:
    for a, b in zip(ours, reference, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert min(a.shape) < 2 or a.stride() == b.stride()
        assert torch.equal(bits(a), bits(b))


def hard_values(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers over 60 powers of two, outliers, both zeros, denormals, an infinity, a NaN."""
    x = torch.randn(rows, columns) * 2.0 ** torch.randint(-40, 20, (rows, columns))
    x[::3] = torch.randn(x[::3].shape)
    x[1::7] = x[1::7] * 1e-30
    x[2::11] = 0
    if columns > 130 and rows > 130:
        x[5, 7], x[6, 129], x[7] = math.inf, -math.nan, -0.0
        x[8], x[9, 0], x[128, 128] = 1e-41, 3e38, -math.inf
    return x.to(dtype)


def relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


@contextlib.contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """Make public functions use their Triton implementation."""
    here = mock.patch.object
    with (
        here(device, "on_accelerator", lambda x: True),
        here(device, "launching_on", lambda x: contextlib.nullcontext()),
        here(Target, "current", lambda: DESCRIPTORS),
    ):
        yield
