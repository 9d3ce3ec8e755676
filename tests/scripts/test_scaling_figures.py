"""Goodput, projections and exchanged bytes of a scaling report, against figures known by hand."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from configs.errors import UserError
from parallel.gloo import SPAN
from scripts.scaling_report.__main__ import main
from scripts.scaling_report.exchanged import Exchange, compared, counted, exchanged
from scripts.scaling_report.goodput import StepEvent, elapsed, read_goodput
from scripts.scaling_report.projection import errors_of_projection, project, projections
from scripts.scaling_report.runs import read_run
from scripts.scaling_report.traces import read_trace
from tests.runs import TINY, run
from tests.scripts.test_scaling_report import make_run

STARTS = (1000.0, 1060.0)
STEPS = (
    ((1, 1015.0), (2, 1025.0), (3, 1038.0), (4, 1048.0)),
    ((3, 1075.0), (4, 1085.0), (5, 1095.0)),
)
"""Steps of 10 s and their ends: two starts of 5 s, a checkpoint of 2 s and a validation of 1 s
after step 2, from which the second start continues 12 s after the first was killed."""
SAVING = {3: 2.0}
SHARES = {
    "goodput": 50 / 95, "repeated": 20 / 95, "checkpoints": 2 / 95, "between steps": 1 / 95,
    "start-up": 10 / 95, "down": 12 / 95,
}  # fmt: skip


def test_elapsed_time_is_divided_completely() -> None:
    steps = [
        [StepEvent(step, end, 10.0, SAVING.get(step, 0.0) * (i == 0)) for step, end in one]
        for i, one in enumerate(STEPS)
    ]
    found = elapsed(STARTS, steps)
    assert found == pytest.approx(SHARES) and sum(found.values()) == pytest.approx(1)
    assert elapsed([0.0], [[StepEvent(1, 4.0, 3.0)]])["goodput"] == 0.75
    again = elapsed([0.0, 9.0], [[StepEvent(1, 4.0, 3.0)], []])
    assert again["goodput"] == 0.75 and again["down"] == 0, "a start of a complete run"
    lost = elapsed([0.0, 10.0], [[], [StepEvent(1, 20.0, 5.0)]])
    assert lost == pytest.approx(
        {"goodput": 0.25, "repeated": 0, "checkpoints": 0, "between steps": 0, "start-up": 0.25,
         "down": 0.5}
    ), "a start without a step"  # fmt: skip
    back = elapsed([0.0], [[StepEvent(s, e, 1.0) for s, e in ((1, 1), (2, 2), (2, 3), (3, 4))]])
    assert (back["goodput"], back["repeated"]) == (0.75, 0.25), "repeated by the same process"
    long = elapsed([0.0], [[StepEvent(1, 1.0, 1.0), StepEvent(2, 4.0, 1.0, saving=9.0)]])
    assert (long["checkpoints"], long["between steps"]) == (0.5, 0), "no more than there is"


def test_goodput_is_read_from_the_events_of_a_run(tmp_path: Path) -> None:
    for start, steps in zip(STARTS, STEPS, strict=True):
        with SummaryWriter(str(tmp_path / "tensorboard"), filename_suffix=str(start)) as board:
            for step, end in steps:
                board.add_scalar("step_s", 10.0, step, walltime=end)
                if start == STARTS[0] and step in SAVING:
                    board.add_scalar("checkpoint/blocked_s", SAVING[step], step, walltime=end)
                board.add_scalar("loss", 3.0, step, walltime=end)
    attempts = [{"time": "1970-01-01T00:16:40+0000"}, {"time": "1970-01-01T01:17:40+0100"}]
    assert read_goodput(tmp_path, attempts) == pytest.approx(SHARES)
    assert read_goodput(tmp_path / "absent", attempts) == {}
    with pytest.raises(UserError, match="times of its steps cannot be read"):
        read_goodput(tmp_path, [{"time": "yesterday"}])


def point(ranks: int, speed: float, fixed: float = 0.3, **more: Any) -> dict[str, Any]:
    return {
        "kind": "measured", "forced_routing": False, "ranks": ranks, "global_batch": 8,
        "micro_batch": 1, "mesh": {},
        "tokens_per_s": speed, "step_s_median": 100 / speed,
        "breakdown": {"FSDP, exposed": fixed / 3, "other, exposed": 2 * fixed / 3,
                      "dispatch, exposed": 0.1}, **more,
    }  # fmt: skip


def test_projected_points_follow_the_formula() -> None:
    strong = project(point(2, 100), 4, is_weak=False)
    ratio = 0.7 * (2 / 4) + 0.3 * (3 / 4) / (1 / 2)
    assert strong["step_s_median"] == pytest.approx(1 * ratio)
    assert strong["tokens_per_s"] == pytest.approx(100 / ratio)
    assert strong["kind"] == "projected" and strong["from_ranks"] == 2
    weak = project(point(2, 100), 4, is_weak=True)
    ratio = 0.7 + 0.3 * 1.5
    assert weak["tokens_per_s"] == pytest.approx(2 * 100 / ratio), "twice the tokens of a step"
    assert weak["tokens_per_s_per_rank"] == pytest.approx(100 / ratio / 2)
    ideal = project(point(2, 100, fixed=0), 1024, is_weak=True)
    assert ideal["tokens_per_s_per_rank"] == pytest.approx(50), "nothing that grows"


def test_projections_start_from_the_most_ranks_and_know_their_error() -> None:
    points = [point(1, 60), point(2, 100), point(4, 150)]
    found = projections(points, [8, 16], is_weak=True)
    assert [(p["from_ranks"], p["ranks"]) for p in found] == [(4, 8), (4, 16)]
    (error,) = errors_of_projection(points, is_weak=False)
    assert (error["from_ranks"], error["ranks"]) == (2, 4)
    assert error["error"] == pytest.approx((100 / 0.8) / 150 - 1)
    with pytest.raises(UserError, match="numbers up to 8 are possible"):
        projections(points, [16], is_weak=False)
    with pytest.raises(UserError, match="4 ranks were measured; give larger"):
        projections(points, [4], is_weak=False)
    with pytest.raises(UserError, match="at least 2 ranks and a profiled step"):
        projections(points[:1], [4], is_weak=False)


def test_a_report_marks_what_is_projected(tmp_path: Path) -> None:
    small: dict[str, Any] = {"train.micro_batch": 1, "batch": 16}
    speeds = ((1, 100), (2, 160), (4, 250))
    runs = [make_run(tmp_path / str(n), n, speed, **small) for n, speed in speeds]
    for one, ranks in zip(runs[1:], (2, 4), strict=True):
        add_profile(one, ranks)
    words = [*map(str, runs), "--out", str(tmp_path / "out"), "--project", "8,16"]
    assert main(words) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    kinds = [(p["kind"], p["ranks"]) for p in report["points"]]
    assert kinds == [("measured", 1), ("measured", 2), ("measured", 4),
                     ("projected", 8), ("projected", 16)]  # fmt: skip
    # the profiled step has 10 of 100 us of exposed FSDP, nothing else exposed
    ratio = 0.9 * 4 / 8 + 0.1 * (7 / 8) / (3 / 4)
    assert report["points"][3]["tokens_per_s"] == pytest.approx(250 / ratio)
    assert report["points"][3]["efficiency"] == pytest.approx(250 / ratio / 8 / 100)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| natural | projected | 8 | from 4 ranks |" in text
    assert "T(n) = T(m) * [(1 - F) * s + F * r]" in text
    assert "| natural | 2 | 4 | " in text, "the error of the formula where it was measured"
    assert "No run has forced routing" in text
    assert "projected" in (tmp_path / "out" / "report.html").read_text()


def event(name: str, ts: float, dur: float, tid: int = 1, **more: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "tid": tid, "cat": "cpu_op", **more}


def add_profile(folder: Path, ranks: int) -> None:
    """Traces of step 8 of all ranks: 100 us, of which FSDP is exposed for 10."""
    (folder / "profile").mkdir()
    events = [
        event("aten::mm", 0, 80), event("Optimizer.step#AdamW.step", 90, 10),
        event("gloo:all_gather", 80, 10, tid=2),
    ]  # fmt: skip
    for rank in range(ranks):
        path = folder / "profile" / f"step-00000008-rank-{rank:05d}.json"
        path.write_text(json.dumps({"traceEvents": events}))


def test_traces_of_every_rank_are_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / str(n), n, 100) for n in (1, 2, 4)]
    add_profile(runs[1], 1)

    def refused() -> str:
        assert main([*map(str, runs), "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    assert "1 traces of step-00000008, but 2 ranks" in refused()
    shutil.rmtree(runs[1] / "profile")
    add_profile(runs[2], 4)
    assert "config.toml is not that of 4 ranks: train.global_batch = 8" in refused()
    (runs[2] / "profile" / "step-00000008-rank-00003.json").write_text("{")
    assert "a trace cannot be read" in refused()


def traced(name: str, shapes: list[Any], concrete: list[str] | None = None) -> dict[str, Any]:
    types = ["float" if shape else "" for shape in shapes]
    args = {"Input Dims": shapes, "Input type": types, "Concrete Inputs": concrete or []}
    return event(name, 0, 1, args=args)


def test_bytes_are_counted_by_kind_and_ranks() -> None:
    events = [
        traced("c10d::_allgather_base_", [[40], [10]]),
        traced("_c10d_functional::all_gather_into_tensor", [[3, 5], [], []], ["", "2", ""]),
        traced("c10d::allgather_into_tensor_coalesced_", [[[6, 5]], [[3, 5]]]),  # the same again
        traced("c10d::_reduce_scatter_base_", [[5], [20]]),
        traced("_c10d_functional::reduce_scatter_tensor", [[15], [], []], ["", "", "3"]),
        traced("gloo:all_reduce", [[15]]), traced("gloo:all_reduce", [[7]]),
        event(f"{SPAN}2", 50, 10), event(f"{SPAN}4", 70, 10, tid=7),
        traced("c10d::alltoall_base_", [[6], [6], [], []], ["", "", "", "[]"]) | {"ts": 55},
        traced("c10d::alltoall_base_", [[4], [4], [], []], ["", "", "", "[]"]) | {"ts": 75},
        traced("c10d::allreduce_", [[[7]]]),
        traced("c10d::alltoall_base_", [[9, 2], [8, 2], [], []], ["", "", "", "[3, 6]"]),
        traced("c10d::alltoall_base_", [[8], [8], [], []], ["", "", "", "[]"]),
    ]  # fmt: skip
    assert counted(events) == {
        ("all-gather", 4): 160, ("all-gather", 2): 120, ("reduce-scatter", 4): 80,
        ("reduce-scatter", 3): 60, ("reduce-scatter", 2): 24,
        ("all-reduce", None): 28, ("all-to-all", 2): 64, ("all-to-all", None): 48,
    }  # fmt: skip


def test_bytes_are_next_to_the_axes_that_can_be_meant() -> None:
    predicted = {
        "dp_shard all-gather": 100, "tp all-gather": 10, "efsdp all-gather": 30,
        "ep all-to-all": 5, "dp_replicate all-reduce": 7, "tp all-reduce": 1,
    }  # fmt: skip
    sizes = {"dp_shard": 4, "tp": 2, "efsdp": 2, "ep": 4, "dp_replicate": 2}
    measured = {
        ("all-gather", 4): 100, ("all-gather", 2): 41, ("all-to-all", 4): 6.0,
        ("all-reduce", None): 9, ("reduce-scatter", 8): 3,
    }  # fmt: skip
    rows = compared(predicted, sizes, measured)
    assert rows == [
        Exchange("all-gather", ("efsdp", "tp"), 40, 41),
        Exchange("all-gather", ("dp_shard",), 100, 100),
        Exchange("all-reduce", ("dp_replicate", "tp"), 8, 9),
        Exchange("all-to-all", ("ep",), 5, 6),
        Exchange("reduce-scatter", (), 0, 3),
    ]


@pytest.mark.long
def test_two_ranks_exchange_what_is_predicted(overrides: list[str], tmp_path: Path) -> None:
    """Oracle: with forced routing the loads are even, so the prediction holds to the byte."""
    words = ["--train.steps=6", "--train.profile_steps=[6]", "--model.moe.force_balance=true"]
    run("-m", "train", TINY, *overrides, *words, ranks=2)
    found = read_run(tmp_path / "run")
    traces = sorted((tmp_path / "run" / "profile").iterdir())
    rows = exchanged(found, [read_trace(path) for path in traces])
    by_kind = {row.kind: row for row in rows}
    for kind, axis in (
        ("all-gather", "dp_shard"),
        ("reduce-scatter", "dp_shard"),
        ("all-to-all", "ep"),
    ):
        assert by_kind[kind].axes == (axis,)
        assert by_kind[kind].measured == by_kind[kind].predicted > 1000
    assert 0 < (by_kind["all-reduce"].measured or 0) < 1000, "sums of a few numbers"
    parts = read_goodput(found.folder, found.attempts)
    assert sum(parts.values()) == pytest.approx(1, abs=0.1), "starts are recorded in seconds"
    assert 0 < parts["goodput"] < 1 and parts["repeated"] == parts["down"] == 0
