"""The parser of commands: one line for an error, and help in the lines of its description."""

import pytest

from configs.command_line import CommandParser


def test_descriptions_keep_their_lines(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["`python -m tool FILE`: does it.", "", "    python -m tool a", "    python -m tool b"]
    parser = CommandParser(prog="python -m tool", description="\n".join(lines))
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "\n".join(lines) in printed


def test_an_error_takes_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    parser = CommandParser(prog="python -m tool")
    parser.add_argument("--size", type=int)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--size", "a\nb" * 1000])
    assert ended.value.code == 2
    out, errors = capsys.readouterr()
    assert out == "" and errors.count("\n") == 1 and len(errors) < 600
    assert errors.startswith("error: argument --size:") and "python -m tool --help" in errors
