"""TensorBoard's file of a run, written in the thread that trains: TensorBoard's own writer has a
thread that ends with a traceback if the disk is full, and the training with it."""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor

from train.report.record_file import RecordFile

_HALF = 1e-12 * 1.1 ** np.arange(775)
_BINS = np.concatenate([-_HALF[::-1], [0.0], _HALF])
"""Edges as in TensorFlow: 10 percent apart, up to 1e20."""


class EventFile:
    """Scalars and histograms by step, in a new file in `folder`."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """first_step: later steps of earlier files are hidden; they are repeated from here on.
        Raises OSError if the file cannot be created."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.file = RecordFile(folder / name)
        self._records = RecordWriter(self.file)
        self._add(Event(file_version="brain.Event:2"), first_step)
        self._add(Event(session_log=SessionLog(status=SessionLog.START)), first_step)
        self.file.flush()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add one value per name."""
        parts = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(Event(summary=Summary(value=parts)), step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Add the distribution of finite values."""
        flat = values.detach().cpu().double().numpy().reshape(-1)
        counts, edges = np.histogram(flat, _BINS)
        filled = np.flatnonzero(counts)
        # with one empty bin before the first, from which the plot begins
        first = max(int(filled[0]) - 1, 0) if len(filled) else 0
        last = int(filled[-1]) + 1 if len(filled) else 1
        histogram = HistogramProto(
            min=flat.min(initial=np.inf), max=flat.max(initial=-np.inf), num=flat.size,
            sum=flat.sum(), sum_squares=flat @ flat,
            bucket_limit=edges[first + 1 : last + 1].tolist(), bucket=counts[first:last].tolist(),
        )  # fmt: skip
        self._add(Event(summary=Summary(value=[Summary.Value(tag=name, histo=histogram)])), step)

    def _add(self, event: Event, step: int) -> None:
        event.step, event.wall_time = step, time.time()
        self._records.write(event.SerializeToString())
