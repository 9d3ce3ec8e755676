"""Runs `python -m train` within the test process: a training of two steps costs a third of one in a
fork, which finds the caches of torch empty. No pictures are drawn."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from unittest import mock

import torch
import torch.distributed as dist

from tests.runs import TINY
from train import atomic_files
from train.__main__ import main
from train.report import reporter


@contextmanager
def _process_restored() -> Iterator[None]:
    """Restore what the end of a process would restore: signals, locks, threads, the process
    group."""
    threads = torch.get_num_threads()
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)
        torch.set_num_threads(threads)
        while atomic_files._CLAIMS:
            os.close(atomic_files._CLAIMS.pop())
        if dist.is_initialized():
            dist.destroy_process_group()


def train(*arguments: str) -> int:
    """Train tests/tiny.toml with these overrides in one process; returns the exit code. A step has
    one microbatch instead of two, unless the overrides say otherwise."""
    with _process_restored(), mock.patch.object(reporter, "draw", return_value=[]):
        return main([str(TINY), "--train.threads=1", "--train.micro_batch=8", *arguments])


def run_train(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """As `run("-m", "train", *arguments)`: check the exit code and return what was printed."""
    words = [str(argument) for argument in arguments]
    out, errors = StringIO(), StringIO()
    as_forks = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (
        _process_restored(),
        mock.patch.object(reporter, "draw", return_value=[]),
        mock.patch.dict(os.environ, as_forks),
        redirect_stdout(out),
        redirect_stderr(errors),
    ):
        torch.set_num_threads(1)
        returned = main(words)
    done = subprocess.CompletedProcess(words, returned, out.getvalue(), errors.getvalue())
    assert returned == code, f"exit {returned}\n{done.stdout}\n{done.stderr}"
    return done
