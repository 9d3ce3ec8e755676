"""`python -m scripts.inject_faults`: its refusals, what it changes, and requests to ranks."""

import json
import os
import random
import socket
from pathlib import Path

import pytest

from configs.errors import UserError
from scripts.inject_faults.__main__ import flip_bit, main
from scripts.inject_faults.requests import READY, Request, folder_of, receive, send


def write_processes(run: Path, host: str = "", pid: int = 0) -> None:
    table = {"0": {"host": host or socket.gethostname(), "pid": pid or os.getpid()}}
    (run / "processes.json").write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--freeze", "0"], "processes.json: not found"),
        (["--freeze", "7"], "rank 7: the run has the ranks 0 to 0"),
        (["--kill-rank", "0"], "is no longer a rank"),
        (["--freeze", "0"], "runs on elsewhere; run this command there"),
        (["--freeze", "0"], "processes.json: damaged"),
        (["--nan", "0"], "do not accept faults; start them with the module"),
        (["--nan", "0"], f"process {2**22 + 1} has ended"),
        (["--slow", "0", "--percent", "-5"], "--percent -5.0: must be from 0 to 10000"),
        (["--slow", "0", "--percent", "nan"], "--percent nan: must be from 0"),
        (["--disk-full", "0", "--steps", "0"], "--steps 0: must be from 1 to 1e+06"),
        (["--flip-bit"], "no checkpoint yet"),
        ([], "no fault given"),
    ],
)
def test_refusals_are_one_line(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "elsewhere" in expected:
        write_processes(tmp_path, host="elsewhere")
    elif "damaged" in expected:
        (tmp_path / "processes.json").write_text("[]")
    elif "not found" not in expected:
        pids = {"no longer": 1, "has ended": 2**22 + 1}  # the second is beyond all processes
        write_processes(tmp_path, pid=next((p for k, p in pids.items() if k in expected), 0))
    assert main([str(tmp_path), *words]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and expected in said.err and not said.out


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent"), "--flip-bit"]) == 2
    assert "no such folder of a run" in capsys.readouterr().err


def test_exactly_one_bit_of_the_newest_checkpoint_is_flipped(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        flip_bit(tmp_path, random.Random(0))
    files = {}
    for step in (1, 2):
        folder = tmp_path / "checkpoints" / f"step-{step:08}"
        folder.mkdir(parents=True)
        for name, size in (("a", 1), ("b", 100), ("c", 0)):
            files[folder / name] = os.urandom(size)
            (folder / name).write_bytes(files[folder / name])
    for seed in range(20):
        flip_bit(tmp_path, random.Random(seed))
        changed = {path for path, content in files.items() if path.read_bytes() != content}
        assert len(changed) == 1 and changed.pop().parent.name == "step-00000002"
        bits = sum(
            (a ^ b).bit_count()
            for path, content in files.items()
            for a, b in zip(path.read_bytes(), content, strict=True)
        )
        assert bits == 1
        for path, content in files.items():
            path.write_bytes(content)


def test_a_request_reaches_its_rank_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of(tmp_path).mkdir()
    (folder_of(tmp_path) / READY).touch()
    write_processes(tmp_path)
    assert main([str(tmp_path), "--slow", "0", "--percent", "30"]) == 0
    assert "slow" in capsys.readouterr().out
    assert receive(tmp_path, 1) is None
    assert receive(tmp_path, 0) == Request("slow", 30.0) and receive(tmp_path, 0) is None
    for damaged in ("", "[]", '{"kind": "explode"}', '{"other": 1}'):
        (folder_of(tmp_path) / "rank-00002.json").write_text(damaged)
        assert receive(tmp_path, 2) is None
    send(tmp_path, 3, Request("nan"))
    assert receive(tmp_path, 3) == Request("nan")
