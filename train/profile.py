"""Profiler traces of chosen steps, in Chrome's trace format (open in ui.perfetto.dev)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@contextmanager
def profiled(path: Path) -> Iterator[None]:
    """Record a profile of the context and write it to `path`."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as recorder:
        yield
    path.parent.mkdir(parents=True, exist_ok=True)
    recorder.export_chrome_trace(str(path))
