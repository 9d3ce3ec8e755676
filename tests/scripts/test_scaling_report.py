"""The scaling report against figures that are known by construction, and its refusals."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from configs.loader import load, to_toml
from scripts.scaling_report.__main__ import main
from scripts.scaling_report.figures import interval
from scripts.scaling_report.traces import breakdown, length, overlap, read_trace
from tests.runs import TINY


def make_run(
    folder: Path, ranks: int, speed: float, *, forced: bool = False, batch: int = 8, **more: Any
) -> Path:
    """A run of 8 steps; after two slow ones of warmup each has `speed` tokens/s."""
    folder.mkdir(parents=True)
    changes = {"train.global_batch": batch, "model.moe.force_balance": str(forced).lower(), **more}
    config = load(TINY, [f"--{key}={value}" for key, value in changes.items()])
    (folder / "config.toml").write_text(to_toml(config))
    step_s = batch * config.data.seq_len / speed
    steps = [
        {"step": i, "loss": 5.0, "lr": 0.1, "step_s": step_s * (50 if i < 3 else 1),
         "tokens_per_s": speed, "data_share": 0.01, "memory_gib": 0.5}
        for i in range(1, 9)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    load_lines = [{"step": i, "load": [[3, 1, 1, 1], [2, 2, 1, 1]]} for i in range(1, 9)]
    (folder / "expert_load.jsonl").write_text("".join(json.dumps(s) + "\n" for s in load_lines))
    attempt = {"ranks": ranks, "mesh": {"dp_shard": ranks, "tp": 1}, "device": "a CPU",
               "packages": {"torch": "2"}}  # fmt: skip
    (folder / "environment.json").write_text(json.dumps([attempt]))
    return folder


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures, which take longest, in tests that do not look at them."""
    if request.function is not test_figures_are_those_of_the_runs:
        monkeypatch.setattr("scripts.scaling_report.__main__.draw", lambda out, report: [])


def report(tmp_path: Path, *runs: Path) -> dict[str, Any]:
    assert main([*map(str, runs), "--out", str(tmp_path / "out"), "--note", "<b>x"]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "out" / "report.json").read_text())
    return found


def test_figures_are_those_of_the_runs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"1-{i}", 1, speed) for i, speed in enumerate((90, 100, 110))]
    runs += [make_run(tmp_path / f"2-{i}", 2, speed) for i, speed in enumerate((150, 160, 170))]
    runs += [make_run(tmp_path / f"f{n}", n, 100 * n, forced=True) for n in (1, 2)]
    found = report(tmp_path, *runs)
    assert found["scaling"] == "strong"
    one, two, forced_one, forced_two = found["points"]
    assert one["tokens_per_s"] == pytest.approx(100), "the slow warmup is left out"
    half = 4.303 * 10 / math.sqrt(3)
    assert one["tokens_per_s_half_width"] == pytest.approx(half, rel=1e-3)
    assert two["efficiency"] == pytest.approx(0.8)
    expected = 0.8 * math.hypot(half / 100, half / 160)
    assert two["efficiency_half_width"] == pytest.approx(expected, rel=1e-3)
    assert forced_two["efficiency"] == pytest.approx(1) and forced_one["forced_routing"]
    assert forced_two["tokens_per_s_half_width"] is None
    assert one["imbalance"] == pytest.approx((2 + 4 / 3) / 2) and one["kind"] == "measured"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;b&gt;x" in page and "<b>x" not in page and page.count("data:image/png") == 1, (
        "nothing was profiled"
    )
    assert 'src="http' not in page
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| natural | measured | 2 | dp_shard 2 | 3 | 160 ± 25 | 80 | 0.80 ± 0.23 |" in text


def test_weak_scaling_is_recognized(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(n), n, 100 * n, batch=8 * n) for n in (1, 2, 4)]
    found = report(tmp_path, *runs)
    assert found["scaling"] == "weak"
    assert [point["efficiency"] for point in found["points"]] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"model.d_model": 48}, "model.d_model = 48, but"),
        ({"data.seq_len": 16}, "data.seq_len = 16, but"),
        ({"precision.recipe": "bf16"}, "precision.recipe = 'bf16', but"),
        ({"train.micro_batch": 2}, "train.micro_batch = 2, but"),
    ],
)
def test_runs_that_differ_in_more_than_their_mesh_are_refused(
    more: dict[str, Any], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / "a", 1, 100), make_run(tmp_path / "b", 2, 100, **more)]
    assert main([*map(str, runs), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_unusable_runs_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, other = make_run(tmp_path / "a", 1, 100), make_run(tmp_path / "b", 2, 100)
    (tmp_path / "empty").mkdir()
    odd = make_run(tmp_path / "odd", 4, 100, batch=24)
    last = make_run(tmp_path / "a run", 2, 100)

    def refused(*runs: Path | str) -> str:
        assert main([*map(str, runs), "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    assert "no run with metrics" in refused(good, tmp_path / "empty")
    assert "no run with metrics" in refused(good, tmp_path / "absent")
    assert "neither the same in all runs" in refused(good, other, odd)
    assert "all runs have 1 ranks" in refused(good)
    (other / "environment.json").write_text("[{}]")
    assert "missing or damaged" in refused(good, other)
    lines = (good / "metrics.jsonl").read_text().splitlines(keepends=True)
    (good / "metrics.jsonl").write_text("".join(lines[:4]))
    assert "at least 3 are needed" in refused(good)
    (good / "metrics.jsonl").write_text("".join(lines))
    assert "a run is given twice" in refused(good, odd, good)
    assert "--project 8,x: must be numbers" in refused(good, "--project", "8,x")
    assert "no measured point with natural routing" in refused(good, last, "--project=8")
    (last / "config.toml").write_text("[model")
    assert "config.toml" in refused(good, last)


def test_intervals_and_spans() -> None:
    assert interval([5.0]) == (5.0, None)
    assert interval([1.0, 3.0]) == (2.0, pytest.approx(12.706))
    assert length([(0, 2), (1, 3), (5, 6)]) == 4
    assert overlap([(0, 4), (6, 8)], [(3, 7)]) == 2


def test_a_breakdown_divides_the_step(tmp_path: Path) -> None:
    def event(
        name: str, ts: float, dur: float, tid: int = 1, cat: str = "cpu_op"
    ) -> dict[str, Any]:
        return {"ph": "X", "name": name, "ts": ts, "dur": dur, "tid": tid, "cat": cat}

    events = [
        event("aten::mm", 0, 40), event("autograd::engine::evaluate_function: x", 50, 40),
        event("aten::mm", 60, 20),
        event("Optimizer.step#AdamW.step", 90, 10, cat="user_annotation"),
        event("gloo:all_to_all", 30, 20, tid=2, cat="user_annotation"),
        event("gloo:all_gather", 70, 30, tid=2, cat="user_annotation"),
    ]  # fmt: skip
    path = tmp_path / "step-00000001-rank-00000.json"
    path.write_text(json.dumps({"traceEvents": events}))
    found = breakdown(read_trace(path))
    assert found == pytest.approx({
        "forward": 0.5, "backward": 0.4, "optimizer": 0.1, "dispatch, hidden": 0.1,
        "dispatch, exposed": 0.1, "FSDP, hidden": 0.1, "FSDP, exposed": 0.2,
        "other, hidden": 0, "other, exposed": 0,
    })  # fmt: skip


def test_records_without_possible_figures_are_left_out_and_counted(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run {n}", n, 100 * n) for n in (1, 2)]
    path = runs[1] / "metrics.jsonl"
    steps = path.read_text().splitlines()
    steps[3] = steps[3][:-9]  # damaged
    steps[4] = steps[4].replace('"step_s": ', '"step_s": -')
    steps[5] = steps[5].replace('"memory_gib": 0.5', '"memory_gib": NaN')
    steps.append('{"step": 9, "loss": 5.0, "lr": 0.1}')
    steps[2] = steps[2].replace('"data_share": 0.01, ', "")
    path.write_text("\n".join(steps) + "\n")
    extra = json.loads(steps[7]) | {"step": 10}
    path.write_text(path.read_text() + json.dumps(extra) + "\n")
    found = report(tmp_path, *runs)
    assert found["points"][1]["tokens_per_s"] == pytest.approx(200)
    assert "run 2: 5 steps have no usable record; they are left out." in found["remarks"]
    (runs[0] / "expert_load.jsonl").unlink()
    found = report(tmp_path, *runs)
    assert found["points"][0]["imbalance"] is None
    (tmp_path / "blocked").write_text("")
    assert main([*map(str, runs), "--out", str(tmp_path / "blocked" / "x")]) == 2


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("environment.json", '"ranks": 2', '"ranks": 0', "missing or damaged"),
        ("environment.json", '"ranks": 2', '"ranks": -2', "missing or damaged"),
        ("environment.json", "[{", "[] [{", "missing or damaged"),
        ("environment.json", "}]", '}, {"ranks": 2, "mesh": {"tp": 2}, "device": "a CPU", '
         '"packages": {"torch": "2"}}]', "continued on another mesh"),
        ("metrics.jsonl", '"data_share": 0.01', '"data_share": 7', "0 steps; at least 3"),
        ("metrics.jsonl", '"step_s": ', '"step_s": 1' + "0" * 400 + ', "x": ', "no run with"),
        ("metrics.jsonl", '{"step": ', '{"step": 1000', "0 steps; at least 3"),
        ("profile/step-00000008-rank-00000.json", "", "", "its step has no duration"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_damaged_figures_are_one_line(
    file: str, old: str, new: str, expected: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    runs = [make_run(tmp_path / "a", 1, 100), make_run(tmp_path / "b", 2, 100)]
    (runs[1] / "profile").mkdir()
    event = {"ph": "X", "name": "Optimizer.step#x", "ts": 1, "dur": 0, "tid": 1, "cat": "cpu_op"}
    for rank in range(2 if "profile" in file else 0):
        path = runs[1] / "profile" / f"step-00000008-rank-{rank:05}.json"
        path.write_text(json.dumps({"traceEvents": [event]}))
    path = runs[1] / file
    path.write_text(path.read_text().replace(old, new) if old else path.read_text())
    assert main([*map(str, runs), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_repeated_records_and_impossible_loads_do_not_count(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{n}", n, 100 * n) for n in (1, 2)]
    path = runs[1] / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    slow = [line.replace('"step_s": ', '"step_s": 9') for line in lines[3:]]
    path.write_text("".join([*lines[:3], *slow, *lines[3:]]))
    (runs[0] / "expert_load.jsonl").write_text(
        '{"step": 1, "load": [[-1, 1], [0, 0]]}\n{"step": 2, "load": [[3, 1]]}\n'
    )
    found = report(tmp_path, *runs)
    assert found["points"][1]["tokens_per_s"] == pytest.approx(200), "the last record of a step"
    assert found["points"][0]["imbalance"] == 1.5
    assert not any("usable" in remark for remark in found["remarks"])


def test_a_routing_without_all_ranks_is_named(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"n{n}", n, 100 * n) for n in (1, 2, 4)]
    runs += [make_run(tmp_path / f"f{n}", n, 100 * n, forced=True) for n in (2, 4)]
    expected = "No run with forced routing has 1 ranks; its efficiency is relative to 2 ranks."
    assert report(tmp_path, *runs)["remarks"] == [expected]
    assert report(tmp_path, *runs[1:])["remarks"] == []
    assert report(tmp_path, *runs[:4])["remarks"] == [
        "No run with forced routing has 1, 4 ranks; its efficiency is relative to 2 ranks."
    ]
