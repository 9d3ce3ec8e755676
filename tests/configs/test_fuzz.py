"""Sets every key to many invalid and unusual values, in a file and as an override. Each gives
either a config that is unchanged after being written and read, or a one-line error that names the
key."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tomli
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError, UserError
from configs.loader import flatten, load, parse_arguments, to_toml
from tests.runs import TINY

TREE = tomli.loads(TINY.read_text())
GIVEN = flatten(load(TINY))
KEYS = sorted(GIVEN)
TURNS = {
    key: (place, 4 if kind in (str, list) else 8)
    for kind in {type(value) for value in GIVEN.values()}
    for place, key in enumerate(key for key in KEYS if type(GIVEN[key]) is kind)
}
"""The place of a key among those of its type, and of how many values it is given one. Names and
paths have rules of their own; for numbers and switches there are bounds only."""
NASTY = [
    "9" * 309, "-" + "9" * 309, "9" * 4301, "0x" + "f" * 5000, str(2**63), str(-(2**63)), "0", "-1",
    "1e308", "-1e308", "-0.0", "nan", "-nan", "inf", "-inf", "5e-324", "1e-30", "1e" + "9" * 400,
    "[" * 400 + "]" * 400, "[" * 3000 + "]" * 3000, "[" * 99, "[]", "[1]", "['a', 'b']", "[[1, 2]]",
    "{}", "{a = 1}", "{ a.b.c = 1 }", "true", "1979-05-27T07:32:00Z", "1979-05-27", "07:32:00",
    "''", "' '", "'/'", "'//'", "'/.'", "'~nobody/x'", "'~'", "'~/x'", "'a*b'", "'a::b'",
    '"\\u0000"', '"a\\nb"', '"\\u2028"', "'" + "x" * 5000 + "'", "'" + "x" * 300 + "'",
    "'..'", "'none'", "'sigmoid'", "3, 4", "3,", "3 # 4", "=", "'", '"', "a = 1\nb = 2",
    "3\nother = 4", "3\n[x]", "\x00", "\udcff", "\ufeff",
]  # fmt: skip


def overwrite(path: Path, content: bytes) -> None:
    """Write into the file that exists: replacing a file takes longer than reading an experiment."""
    path.touch()
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


def outcome(path: Path, overrides: list[str], key: str, again: Path) -> None:
    try:
        config = load(path, overrides)
        text = to_toml(config)
        overwrite(again, text.encode())
        assert load(again) == config
    except UserError as error:
        line = str(error)
        assert len(line.splitlines()) == 1 and len(line) <= 700, line
        assert key in line or "TOML" in line or "UTF-8" in line, line


@cache
def file_without(key: str) -> str:
    """tests/tiny.toml with the value of `key` replaced by "HERE"."""
    tree = copy.deepcopy(TREE)
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
    node[leaf] = "HERE"
    return tomli_w.dumps(tree)


def file_with(key: str, text: str) -> bytes:
    """tests/tiny.toml with the value of `key` replaced by the TOML source `text`."""
    return file_without(key).replace('"HERE"', text).encode("utf-8", "surrogateescape")


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("key", KEYS)
def test_any_value_of_any_key(key: str, every: bool, tmp_path: Path) -> None:
    """every: all values in the file and as an override; otherwise a quarter or an eighth of the
    values in each, in turn, so that every key and every value meets both, and every value every
    type of key in both."""
    path, again = tmp_path / "given.toml", tmp_path / "again.toml"
    place, of = TURNS[key]
    for turn, text in enumerate(NASTY, place):
        if every or turn % of == 1:
            overwrite(path, file_with(key, text))
            outcome(path, [], key.split(".")[0], again)
        if every or turn % of == of // 2:
            outcome(TINY, [f"--{key}={text}"], key.split(".")[0], again)


numbers = st.one_of(
    st.integers().map(str), st.floats().map(repr), st.integers(300, 5000).map(lambda n: "7" * n)
)
texts = st.text(st.characters(), max_size=40)


@settings(
    max_examples=200, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    changes=st.lists(st.tuples(st.sampled_from(KEYS), st.one_of(numbers, texts)), max_size=3),
    loose=texts,
)
def test_anything_at_all(changes: list[tuple[str, str]], loose: str, tmp_path: Path) -> None:
    again = tmp_path / "again.toml"
    outcome(TINY, [f"--{key}={text}" for key, text in changes], "", again)
    outcome(TINY, [f"--{loose}"], "", again)
    outcome(TINY, [f"--{loose}=1", f"--model.{loose}=2"], "", again)


@pytest.mark.parametrize(
    "key",
    ["a.b", "model." + "a." * 1000 + "b", "model." * 1000 + "x", "model..x", ".", "model.\nx",
     "model.\x00", "\udcff.x", "model." + "x" * 100_000, "train.steps" + ".x" * 1000],
    ids=range(10),
)  # fmt: skip
def test_any_unknown_key_is_one_line(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(TINY, [f"--{key}=1"])
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500
    path = tmp_path / "mine.toml"
    path.write_text(tomli_w.dumps({"model": {key: 1}, key: {}}), "utf-8", "surrogateescape")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"a = 1\na = 2", "not valid TOML"),
        (b"[run]\n[run]", "not valid TOML"),
        (b"\xff\xfe", "not UTF-8"),
        (b"run = " + b"[" * 100_000, "not valid TOML"),
        (b"run = " + b"{a = " * 100_000, "not valid TOML"),
        (b"a." * 900 + b"b = 1", "unknown key"),
        (b"a." * 100_000 + b"b = 1", "not valid TOML"),
        (b"[" + b"a." * 900 + b"b]", "unknown key"),
        (b"[model]\nd_model." + b"a." * 900 + b"b = 1", "run: this section is required"),
        (b"[model]\nd_model = " + b"9" * 5000, "not valid TOML"),
        (b"[optimizer]\nlr = " + b"9" * 400, "run: this section is required"),
        (b"x = '" + b"x" * 2**20 + b"'", "larger than 1 MiB"),
        (b"", "run: this section is required"),
    ],
    ids=range(13),
)  # fmt: skip
def test_a_file_that_is_no_experiment(raw: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(raw)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert expected in str(caught.value) and str(path) in str(caught.value)
    assert len(str(caught.value)) < 700 and len(str(caught.value).splitlines()) == 1


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "broken").symlink_to(tmp_path / "absent")
    for path, expected in (
        (tmp_path, "a folder"),
        (tmp_path / "pipe", "a device or pipe"),
        ("/dev/zero", "a device or pipe"),
        ("/dev/null", "a device or pipe"),
        (tmp_path / "loop", "levels of symbolic links"),
        (tmp_path / "broken", "no such file"),
        (tmp_path / "a\nb", "no such file"),
        ("a\0b", "no file can have this name"),
        ("x" * 5000, "name too long"),
        ("\udcff", "no such file"),
    ):
        with pytest.raises(ConfigError, match=expected) as caught:
            load(path)
        assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500


def test_a_suggestion_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load("configs/demo.toml")
    given, suggested = str(caught.value).split(": no such file; did you mean ")
    assert given != suggested.rstrip("?") and Path(suggested.rstrip("?")).is_file()


@pytest.mark.parametrize("ranks", ["9" * 5000, "0", "-1", "²", "1e3", "", "2\n", str(2**21)])
def test_ranks_that_are_none(ranks: str) -> None:
    with pytest.raises(ConfigError, match="must be a positive integer") as caught:
        parse_arguments(["x.toml", f"--ranks={ranks}"])
    assert len(str(caught.value)) < 200


def test_quotes_of_an_override_are_those_of_toml() -> None:
    def read(text: str) -> Any:
        return load(TINY, [f"--run.dir={text}"]).run.dir

    assert [read("a b"), read("'a b'"), read('"a\\tb"'), read("it's")] == [
        "a b",
        "a b",
        "a\tb",
        "it's",
    ]
    with pytest.raises(ConfigError, match="not a TOML string"):
        read('"a"b"')
