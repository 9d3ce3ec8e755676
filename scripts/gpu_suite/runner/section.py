"""What a section is, and its two parts as functions of a process of their own."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any

import torch

from scripts.gpu_suite.harness import Check, Place, Timing
from scripts.gpu_suite.runner.process import Send


class Unsupported(Exception):
    """A section cannot run on this device or machine; the message is the reason."""


def nothing(_: Place) -> Iterator[Timing]:
    """The measurements of a section that only checks."""
    yield from ()


@dataclass(frozen=True)
class Section:
    """Checks of some kernels, and their times. The limits are those of one process, in seconds."""

    name: str
    check: Callable[[Place], Iterator[Check]]
    measure: Callable[[Place], Iterator[Timing]] = nothing
    check_s: float = 120
    measure_s: float = 120
    shares: int = 1
    """Processes that compile the kernels of `measure` together; 0: they are compiled by `check`, or
    when they are measured."""
    requires: tuple[str, ...] = ()
    """Sections whose checks decide what is measured."""
    is_alone: bool = False
    """Whether its checks run after everything else, alone."""


def checking(section: Section, place: Place, threads: int) -> Callable[[Send], None]:
    """Sends every check."""

    def work(send: Send) -> None:
        _begin(place, threads, send)
        try:
            for check in section.check(place):
                send({"check": _plain(asdict(check))})
        except Unsupported as reason:
            send({"unsupported": str(reason)})

    return work


def compiling(section: Section, place: Place, i: int, threads: int) -> Callable[[Send], None]:
    """Runs a share of what is measured, once."""

    def work(send: Send) -> None:
        mine = replace(place, share=(i, section.shares), _rows=count())
        _begin(place, threads, send)
        for _ in section.measure(mine):
            pass

    return work


def measuring(section: Section, place: Place) -> Callable[[Send], None]:
    """Sends every timing, with its rows."""

    def work(send: Send) -> None:
        _begin(place, 0, send)
        for timing in section.measure(place):
            rates = {name: timing.rate(name) for name in timing.milliseconds}
            value = asdict(timing) | {"rates": rates}
            send({"timing": _plain(value), "lines": [*timing.lines()]})

    return work


def _begin(place: Place, threads: int, send: Send) -> None:
    """Limit the threads of this process, and send the time of every kernel that it compiles."""
    if threads:
        torch.set_num_threads(threads)
    if place.device.type != "cuda":
        return
    import triton

    def listen(*, times: Any, cache_hit: bool, **_: object) -> None:
        if not cache_hit:
            send({"compiled_s": times.total / 1e6})  # microseconds

    triton.knobs.compilation.listener = listen
    torch.cuda.set_device(place.device)


def _plain(value: Any) -> Any:
    """For JSON, which has no NaN and no infinity: None instead."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
