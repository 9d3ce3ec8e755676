"""metrics.jsonl, expert_load.jsonl, environment.json and TensorBoard's files are records: damaged
parts are set aside and reported, and stop no run."""

import json
import random
from pathlib import Path

import pytest
import torch

from tests.runs import run
from tests.train.in_process import train
from train.report import environment
from train.report.metrics import EXPERT_LOAD, METRICS, PICTURES, MetricsWriter, read_lines
from train.report.plots import draw

BAD = [
    b"{", b"", b"null", b"[]", b"3", b"\xff\xfe", b"\x00" * 50,
    b'{"step": "3", "loss": 1, "lr": 1}',
    b'{"step": true, "loss": 1, "lr": 1}', b'{"step": 3}', b'{"loss": 1, "lr": 1}', b"[" * 99_999,
    b'{"step": 3, "loss": "1", "lr": 1}', b'{"step": 3, "loss": null, "lr": 1}',
    b'{"step": 3, "loss": [1], "lr": 1}', b'{"step": 3, "loss": ' + b"9" * 5000 + b', "lr": 1}',
    b'{"step": 3, "loss": ' + b"9" * 400 + b', "lr": 1}', b'{"step": 1.5, "loss": 1, "lr": 1}',
]  # fmt: skip
BAD_LOADS = [
    *BAD, b'{"step": 3, "load": null}', b'{"step": 3, "load": [[1, 2], [3]]}',
    b'{"step": 3, "load": [[1.5]]}', b'{"step": 3, "load": [1]}', b'{"step": 3, "load": "x"}',
    b'{"step": 3, "load": [[null]]}',
]  # fmt: skip


def write(folder: Path, first: int, last: int, done: int) -> list[str]:
    writer = MetricsWriter(folder, done)
    for step in range(first, last + 1):
        writer.write(step, {"loss": float(step), "lr": 0.5}, torch.full((2, 4), step))
    writer.close()
    return writer.lines


def mix(path: Path, bad: list[bytes]) -> None:
    lines = path.read_bytes().split(b"\n")[:-1]
    rng = random.Random(0)
    for line in bad:
        lines.insert(rng.randrange(len(lines) + 1), line)
    path.write_bytes(b"\n".join(lines) + b'\n{"step": 9, "cut sho')


def test_damaged_lines_are_set_aside_and_said(tmp_path: Path) -> None:
    assert write(tmp_path, 1, 5, 0) == []
    mix(tmp_path / METRICS, BAD)
    mix(tmp_path / EXPERT_LOAD, BAD_LOADS)
    assert [r["step"] for r in read_lines(tmp_path / METRICS)] == [1, 2, 3, 4, 5]
    said = write(tmp_path, 5, 6, 4)
    assert len(said) == 2
    assert f"metrics.jsonl: {len(BAD)} damaged lines, moved to metrics.jsonl.damaged" in said[0]
    assert f"expert_load.jsonl: {len(BAD_LOADS)} damaged" in said[1]
    for name, bad in ((METRICS, BAD), (EXPERT_LOAD, BAD_LOADS)):
        assert [r["step"] for r in read_lines(tmp_path / name)] == [1, 2, 3, 4, 5, 6]
        aside = (tmp_path / f"{name}.damaged").read_bytes().split(b"\n")[:-1]
        assert sorted(aside) == sorted(bad)
    assert write(tmp_path, 7, 7, 6) == [], "they are said once"
    writer = MetricsWriter(tmp_path, 7)
    writer.amend(7, {"validation_loss": 1.0})
    writer.close()
    assert read_lines(tmp_path / METRICS)[-1]["validation_loss"] == 1.0
    assert len(draw(tmp_path)) == 2


def test_pictures_are_drawn_whatever_backend_is_named(tmp_path: Path) -> None:
    write(tmp_path, 1, 3, 0)
    code = "import sys; from pathlib import Path; from train.report.plots import draw"
    code = f"{code}; print('matplotlib' in sys.modules, len(draw(Path(sys.argv[1]))))"
    done = run("-c", code, tmp_path, env={"MPLBACKEND": "nonsense"})
    assert done.stdout == "False 2\n"


def test_pictures_need_no_agreeing_records(tmp_path: Path) -> None:
    write(tmp_path, 1, 3, 0)
    with (tmp_path / EXPERT_LOAD).open("a") as file:
        file.write('{"step": 4, "load": [[1]]}\n{"step": 5, "load": []}\n')
        file.write('{"step": 6, "load": [[1, 2, 3, 4], [1, 2, 3, 4]]}\n')
    assert len(draw(tmp_path)) == 2
    (tmp_path / METRICS).unlink()
    assert len(draw(tmp_path)) == 2


@pytest.mark.parametrize("name", [METRICS, EXPERT_LOAD, "tensorboard", *PICTURES])
def test_what_is_no_file_or_folder_gives_way(name: str, tmp_path: Path) -> None:
    for attempt in range(2):
        path = tmp_path / name
        if path.is_dir():
            path.rename(tmp_path / f"earlier-{attempt}")
        path.unlink(missing_ok=True)
        if name == "tensorboard":
            path.write_text("a file")
        else:
            path.mkdir()
        (line,) = write(tmp_path, 1, 2, 0)
        assert f"{path}: damaged, renamed to {name}.damaged" in line
        assert len(read_lines(tmp_path / METRICS)) == 2
        if name in PICTURES and attempt:
            draw(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"{", b"", b"null", b"{}", b"[1]", b'["a"]', b"\xff", b"\x00" * 99, b"[" * 99_999, None],
    ids=range(10),
)
def test_a_damaged_environment_is_set_aside(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    (line,) = environment.record(tmp_path, {"attempt": 1})
    assert "environment.json: damaged, renamed to environment.json.damaged" in line
    assert environment.record(tmp_path, {"attempt": 2}) == []
    assert [a["attempt"] for a in json.loads(path.read_text())] == [1, 2]
    aside = tmp_path / "environment.json.damaged"
    assert aside.is_dir() if content is None else aside.read_bytes() == content


def test_a_run_with_damaged_records_resumes(
    overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    words = [*overrides, "--schedule.steps=12", "--validation.sequences=4"]
    assert train(*words, "--train.steps=4") == 0
    mix(folder / METRICS, BAD)
    mix(folder / EXPERT_LOAD, BAD_LOADS)
    (folder / "environment.json").write_text("{")
    (events,) = (folder / "tensorboard").iterdir()
    events.write_bytes(events.read_bytes()[:100] + b"\xff" * 40)
    capfd.readouterr()
    assert train(*words, "--train.steps=6") == 0
    out = capfd.readouterr().out
    for name in (METRICS, EXPERT_LOAD, "environment.json"):
        assert out.count(f"{folder / name}: ") == 1
    assert [r["step"] for r in read_lines(folder / METRICS)] == [1, 2, 3, 4, 5, 6]
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    assert {5, 6} <= {event.step for event in board.Scalars("loss")}
