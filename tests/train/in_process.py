"""Runs `python -m train` within the test process, without a second import of torch."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from tests.runs import TINY
from train import atomic_files
from train.__main__ import main


@contextmanager
def _process_restored() -> Iterator[None]:
    """Restore what the end of a process would restore: signals, locks, the process group."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)
        while atomic_files._CLAIMS:
            os.close(atomic_files._CLAIMS.pop())
        if dist.is_initialized():
            dist.destroy_process_group()


def train(*arguments: str) -> int:
    """Train tests/tiny.toml with these overrides in one process; returns the exit code."""
    with _process_restored():
        return main([str(TINY), "--train.threads=1", *arguments])
