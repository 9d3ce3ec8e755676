"""Records of a run whose disk is full for some time: none is lost, none is written twice."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.runs import largest_file
from train.report import record_file
from train.report.event_file import EventFile
from train.report.metrics import METRICS, MetricsWriter, read_lines
from train.report.record_file import RecordFile


def test_records_wait_for_the_disk_in_their_order(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    said = []

    def steps(first: int, last: int) -> None:
        for step in range(first, last):
            fields = {"loss": float(step), "lr": 0.5} | {f"x/{i}": float(i) for i in range(40)}
            writer.write(step, fields, torch.ones(2, 8))
            writer.flush()
            said.extend(writer.trouble())

    steps(1, 4)
    with largest_file(3000):  # in the middle of a record
        steps(4, 20)
        writer.amend(19, {"validation_loss": 2.0})
        said.extend(writer.trouble())
        steps(20, 30)
    steps(30, 33)
    writer.amend(32, {"validation_loss": 1.0})
    writer.close()
    records = read_lines(tmp_path / METRICS)
    assert [r["step"] for r in records] == list(range(1, 33))
    assert [r["step"] for r in records if "validation_loss" in r] == [32]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(s, s) for s in range(1, 33)]
    for name in (METRICS, "tensorboard"):
        about = [line for line in said if name in line and "validation of" not in line]
        assert len(about) == 2, about
        assert "File too large; training continues" in about[0] and "written again" in about[1]
    assert sum("validation of step 19 cannot be recorded" in line for line in said) == 1


def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_file, "_MOST_WAITING", 10)
    file = RecordFile(tmp_path / "records")
    with largest_file(2):
        for record in (b"abcd\n", b"efgh\n", b"ijkl\n", b"mnop\n"):
            file.write(record)
            file.flush()
    file.write(b"qrst\n")
    file.close()
    lines = (tmp_path / "records").read_bytes().split()
    assert file.lost == 5 - len(lines) == 2 and lines == [b"abcd", b"efgh", b"qrst"]


def test_histograms_are_read_by_tensorboard(tmp_path: Path) -> None:
    values = torch.cat(
        [torch.randn(5000, generator=torch.Generator().manual_seed(0)), torch.zeros(9)]
    )
    file = EventFile(tmp_path, 1)
    file.histogram("h", values, 7)
    file.histogram("none", values[:0], 7)
    file.file.close()
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    (event,) = board.Histograms("h")
    found = event.histogram_value
    assert event.step == 7 and found.num == 5009
    assert found.sum == pytest.approx(float(values.double().sum()), rel=1e-6)
    edges = [-float("inf"), *found.bucket_limit]
    exact = values.double()
    expected = [int(((exact >= a) & (exact < b)).sum()) for a, b in pairwise(edges)]
    assert found.bucket == expected and sum(expected) == 5009
