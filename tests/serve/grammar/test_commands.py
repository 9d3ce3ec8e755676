"""Structured output in commands and scripts, and on two ranks."""

import json
from pathlib import Path

import jsonschema
import pytest

from serve.__main__ import main
from serve.grammar import processes
from tests.runs import ROOT, run
from tests.serve.forked_child import launch_real_worker
from tests.serve.grammar.conftest import PERSON

RUN = ROOT / "tests" / "serve" / "grammar" / "ranks_run.py"


@pytest.mark.long
def test_generate(
    export_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The first command starts the worker as a user's does."""
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(PERSON))
    words = ["generate", str(export_folder), "--prompt", "x", "--device", "cpu", "--seed", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(processes, "launch", launch_real_worker)
        assert main([*words, "--max-tokens", "120", "--json-schema", str(schema)]) == 0
    jsonschema.validate(json.loads(capsys.readouterr().out), PERSON)
    assert main([*words, "--regex", "[a-c]{3}", "--n", "2", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 2 and all(len(one["text"]) == 3 for one in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json-schema", "none.json"], "--json-schema none.json: No such file"),
        (["--json-schema", str(ROOT / "README.md")], "json_schema is not valid JSON"),
        (["--regex", "(a"], "the grammar (regex) is refused: "),
    ],
)
def test_faults_take_one_line(
    options: list[str], message: str, export_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(export_folder), "--prompt", "x", "--device", "cpu", *options]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {message}") and errors.count("\n") == 1


@pytest.mark.long
def test_two_ranks(export_folder: Path, tmp_path: Path) -> None:
    """Texts are those of one process."""
    found = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.json"
        done = run(RUN, ranks, out, export_folder, ranks=ranks)
        assert (done.stdout, done.stderr) == ("", "")
        found.append(json.loads(out.read_text()))
    assert found[0] == found[1] and found[0]["jumped"] > 30
    for text in (text for texts in found[0]["texts"] for text in texts):
        jsonschema.validate(json.loads(text), PERSON)
