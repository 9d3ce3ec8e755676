"""Manifests made by hand, with right checksums: each is read correctly or refused with a one-line
error."""

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.ranks import Ranks, start_ranks, stop_ranks
from tests.train.checkpoint.peak_memory import POSSIBLE, peak_memory
from train.checkpoint import checkpoint
from train.checkpoint.checkpoint import CheckpointError
from train.checkpoint.config_changes import settings_then

RANKS: Ranks
LONG = "x" * 5000
_TENSORS = {"matrix": torch.arange(6.0).view(2, 3), "ids": torch.arange(4, dtype=torch.int32)}


@pytest.fixture(autouse=True, scope="module")
def ranks() -> Iterator[None]:
    global RANKS
    RANKS = start_ranks(threads=1)
    yield
    stop_ranks()


@pytest.fixture(scope="module")
def saved(ranks: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    config = {"train.steps": 9, "data.source": "docs"}
    return Path(checkpoint.save(root, _TENSORS, {"step": 7}, config, None, RANKS))


@pytest.fixture(scope="module")
def good(saved: Path) -> tuple[str, bytes]:
    return (saved / "manifest.json").read_text(), (saved / _FILE).read_bytes()


@pytest.fixture(autouse=True)
def restored(saved: Path, good: tuple[str, bytes]) -> Iterator[None]:
    yield
    (saved / "manifest.json").write_text(good[0])
    (saved / _FILE).write_bytes(good[1])


_FILE = "rank-00000.safetensors"


def put(folder: Path, content: Any) -> None:
    """Write a manifest with its right checksum."""
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if key != "crc32"}
        content["crc32"] = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    (folder / "manifest.json").write_text(json.dumps(content))


def check(folder: Path) -> checkpoint.Manifest:
    """The checks before a tensor is read; an export relies on the sizes that pass them."""
    manifest = checkpoint.read_manifest(folder)
    checkpoint.verify_files(manifest)
    return manifest


def load_all(folder: Path) -> None:
    """All operations of a run on a checkpoint."""
    manifest = check(folder)
    target = {name: torch.zeros_like(tensor) for name, tensor in _TENSORS.items()}
    checkpoint.load(manifest, target)
    for name, tensor in _TENSORS.items():
        assert torch.equal(target[name], tensor), f"{name} was read wrongly"


def refused(folder: Path, by: Callable[[Path], object] = check) -> str:
    """Assert that it is refused, with one line of bounded length and without a large allocation."""
    with peak_memory() as peak, pytest.raises(CheckpointError) as caught:
        by(folder)
    line = str(caught.value)
    assert "\n" not in line and line.isprintable() and len(line) < 1000, line
    assert peak[0] < 32 * 2**20
    return line


@pytest.mark.skipif(not POSSIBLE, reason="Linux only")
@pytest.mark.parametrize("mib", [0, 40])
def test_the_peak_is_that_of_the_block(mib: int) -> None:
    with peak_memory() as peak:
        del [b"x" * (mib << 20)][0]
    assert abs(peak[0] / 2**20 - mib) < 8  # Linux counts pages of several cores at a time


def at(content: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """`content` with another value at one place; `...` removes it."""
    content = deepcopy(content)
    *way, last = path
    node = content
    for key in way:
        node = node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return content


_BOX = ("boxes", 0)
CASES: list[tuple[tuple[str | int, ...], Any, str]] = [
    *[((key,), ..., "is missing") for key in ("state", "config", "files", "boxes")],
    (("format",), ..., "format None"),
    (("format",), True, "format True"),
    *[((key,), None, "None is no") for key in ("state", "config", "files", "boxes")],
    *[((key,), "x", "'x'|is no") for key in ("state", "config", "files", "boxes")],
    (("files", _FILE), None, "must be an object"),
    (("files", _FILE), {}, "bytes of"),
    *[(("files", _FILE, "bytes"), n, "must be an integer") for n in (-1, 1.5, True, "9", 10**30)],
    (("files", _FILE, "bytes"), 5, "expected 5"),
    *[(("files", _FILE, "crc32"), n, "must be an integer") for n in (-1, 1.5, None, 2**32)],
    (("files", LONG), {"bytes": 0, "crc32": 0}, "must be a string of 1 to"),
    (("files", "x" * 900), {"bytes": 0, "crc32": 0}, "missing"),
    *[
        (("files", name), {"bytes": 0, "crc32": 0}, "missing|must be a string")
        for name in ("..", ".", "", "/etc/passwd", "../../etc/passwd", "a/b", "a\0b", "a\nb")
    ],
    *[((*_BOX, "name"), name, "must be a string of 1 to") for name in (LONG, "", None, 3, "a\nb")],
    *[((*_BOX, "file"), f, "must be a string|not listed") for f in (LONG, None, "other", "../x")],
    *[
        ((*_BOX, key), axes, "must be|too large|leaves|differ|incomplete|shape|shapes")
        for key in ("whole", "offset", "shape")
        for axes in (
            [2.0, 3], [-2, 3], [True, 3], [10**30, 3], [2**40, 2**40], ["2", 3], "23", None, 7,
            [2], [], [2, 3, 1], [1] * 1000, [[2], 3], [3, 2], [0, 0], [2, 2**61],
        )
        if not (key == "offset" and axes == [0, 0])
    ],
    (_BOX, None, "must be an object"),
    (_BOX, [], "must be an object"),
    ((*_BOX, "dtype"), "F64", "listed as F64|is F32, listed"),
    ((*_BOX, "dtype"), {"a": LONG}, "listed as|is F32"),
    *[(("state", "step"), s, "step =") for s in ("7", -1, 7.0, None, True, 10**30, [7])],
    (("state", "step"), 8, "the folder says 7"),
    (("state", "step"), ..., "step = None"),
    (("state", "corpus"), {"a": 1}, "must be a scalar"),
    (("state", "corpus"), LONG, "a string of 5000"),
    (("config", "train.steps"), {"a": {"b": 1}}, "must be a scalar"),
    (("config", "train.steps"), [[1]], "must be a scalar"),
    (("config", "train"), 3, "is a key and a section"),
    (("config", LONG), 3, "must be a string of 1 to"),
    (("config", "data.source"), LONG, "a string of 5000"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "expected"), CASES, ids=range(len(CASES)))
def test_a_crafted_entry_is_one_line(
    path: tuple[str | int, ...], value: Any, expected: str, saved: Path, good: tuple[str, bytes]
) -> None:
    put(saved, at(json.loads(good[0]), path, value))
    line = refused(saved)
    assert any(part in line for part in expected.split("|")), line


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "",
        "null",
        "3",
        '"' + LONG + '"',
        "[]",
        '{"format": 1, "format": 1}',
        '{"format": 1, "state": {"step": 1, "step": 2}}',
        '{"format": 1, "x": NaN}',
        '{"format": 1, "x": -Infinity}',
        '{"format": 1e999}',
        '{"format": ' + "9" * 5000 + "}",
        '{"format": "' + LONG + '"}',
        "\x00" * 300,
        '{"format": 1, "crc32": [1]}',
    ],
    ids=range(16),
)
def test_crafted_text_is_one_line(text: str, saved: Path) -> None:
    (saved / "manifest.json").write_text(text)
    refused(saved)


def test_a_key_twice_with_a_right_checksum(saved: Path, good: tuple[str, bytes]) -> None:
    (saved / "manifest.json").write_text('{"format": 1, ' + good[0].removeprefix("{"))
    assert "the key format twice" in refused(saved)
    (saved / "manifest.json").write_text(good[0].replace('"step": 7', '"step": 8, "step": 7'))
    assert "the key step twice" in refused(saved)


def test_bytes_that_are_no_text_and_no_file(saved: Path, tmp_path: Path) -> None:
    (saved / "manifest.json").write_bytes(b"\xff\xfe{")
    refused(saved)
    import os

    os.mkfifo(tmp_path / "manifest.json")
    assert "not a file" in refused(tmp_path)
    for other in ("folder", "link"):
        (tmp_path / other).mkdir()
    (tmp_path / "folder" / "manifest.json").mkdir()
    (tmp_path / "link" / "manifest.json").symlink_to("manifest.json")
    refused(tmp_path / "folder"), refused(tmp_path / "link")
    with (tmp_path / "folder" / "huge").open("wb") as file:
        file.truncate(2**36)
    (tmp_path / "folder" / "manifest.json").rmdir()
    (tmp_path / "folder" / "huge").rename(tmp_path / "folder" / "manifest.json")
    assert "at most" in refused(tmp_path / "folder")


def with_header(saved: Path, good: tuple[str, bytes], change: Callable[[bytes], bytes]) -> None:
    """Change the tensor file and write its right size and checksum."""
    changed = change(good[1])
    (saved / _FILE).write_bytes(changed)
    facts = {"bytes": len(changed), "crc32": zlib.crc32(changed)}
    put(saved, at(json.loads(good[0]), ("files", _FILE), facts))


@pytest.mark.parametrize(
    "change",
    [
        lambda b: struct.pack("<Q", 2**63) + b[8:],
        lambda b: struct.pack("<Q", 2**40) + b[8:],
        lambda b: struct.pack("<Q", 2**26) + b[8:],
        lambda b: struct.pack("<Q", 0) + b[8:],
        lambda b: b[:4],
        lambda b: b"",
        lambda b: b.replace(b'"F32"', b'"I32"'),
        lambda b: b.replace(b'"I32"', b'"F32"'),
        lambda b: b.replace(b'"F32"', b'"F99"'),
        lambda b: b.replace(b'[2,3]', b'[3,2]'),
        lambda b: b.replace(b'[2,3]', b'[6,1]'),
        lambda b: b.replace(b'[2,3]', b'[9,9]'),
        lambda b: b.replace(b'matrix', b'martix'),
        lambda b: b.replace(b'"data_offsets":[0,', b'"data_offsets":[8,'),
        lambda b: struct.pack("<Q", 50_000) + b"[" * 50_000 + b[8:],
        lambda b: struct.pack("<Q", 5_002) + b'"' + b"x" * 5_000 + b'"' + b[8:],
    ],
    ids=range(16),
)  # fmt: skip
def test_a_crafted_header_is_one_line(
    change: Callable[[bytes], bytes], saved: Path, good: tuple[str, bytes]
) -> None:
    with_header(saved, good, change)
    refused(saved)


def test_a_dtype_is_compared_also_where_none_is_listed(
    saved: Path, good: tuple[str, bytes]
) -> None:
    with_header(saved, good, lambda b: b.replace(b'"I32"', b'"F32"'))
    content = json.loads((saved / "manifest.json").read_text())
    for box in content["boxes"]:
        del box["dtype"]
    put(saved, content)
    line = refused(saved, load_all)
    assert "is torch.float32, the model asks for torch.int32" in line


def test_overlapping_boxes(saved: Path, good: tuple[str, bytes]) -> None:
    content = json.loads(good[0])
    content["boxes"] = [*content["boxes"], *content["boxes"]]
    put(saved, content)
    assert "overlap" in refused(saved, load_all)


def test_a_link_out_of_the_folder(saved: Path, good: tuple[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(good[1])
    (saved / _FILE).unlink()
    (saved / _FILE).symlink_to(tmp_path / "outside")
    try:
        assert "missing" in refused(saved)
    finally:
        (saved / _FILE).unlink()


def places(node: Any, way: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place in a JSON value."""
    items: Any = ()
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, list):
        items = enumerate(node)
    return [*([way] if way else []), *(p for k, v in items for p in places(v, (*way, k)))]


_ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**70), 2**70), st.floats(),
    st.text(max_size=20), st.just(LONG), st.lists(st.integers(-2, 9), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3), st.just(...),
    st.recursive(st.integers(), lambda x: st.lists(x, max_size=3), max_leaves=8),
)  # fmt: skip


@pytest.mark.parametrize("changes", [100, pytest.param(400, marks=pytest.mark.slow)])
def test_any_change_is_read_rightly_or_refused_in_one_line(
    changes: int, saved: Path, good: tuple[str, bytes]
) -> None:
    @settings(max_examples=changes, deadline=None, derandomize=True, database=None)
    @given(data=st.data())
    def change(data: st.DataObject) -> None:
        content = json.loads(good[0])
        path = data.draw(st.sampled_from(places(content)))
        changed = at(content, path, data.draw(_ODD))
        put(saved, changed)
        try:
            load_all(saved)
        except CheckpointError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000

    change()


@pytest.mark.parametrize(
    "config",
    [
        {"train.steps": "many"},
        {"train.steps": 1.5},
        {"nothing.known": 1},
        {"x" * 900: 1},
        {"train..steps": 1},
        {".": 1},
        {"a" + ".b" * 400: 1},
        {"optimizer.lr": 10**400},
        {"model": 3},
        {"model.moe": "x" * 4000},
        {"run.dir": "x" * 4000},
        {"data.source": None},
        {"model.attention.kind": ["gqa"]},
        {"train.profile_steps": "all"},
        {},
    ],
    ids=range(15),
)
def test_settings_of_a_checkpoint_are_checked_as_any_others(
    config: dict[str, Any], tmp_path: Path
) -> None:
    path = Path(checkpoint.save(tmp_path, _TENSORS, {"step": 1}, config, None, RANKS))
    with pytest.raises(CheckpointError) as caught:
        settings_then(checkpoint.read_manifest(path))
    line = str(caught.value)
    assert "\n" not in line and len(line) < 1000 and str(path) in line, line


def test_the_checksum_is_that_of_the_documentation(good: tuple[str, bytes]) -> None:
    content = json.loads(good[0])
    crc = content.pop("crc32")
    assert crc == zlib.crc32(json.dumps(content, sort_keys=True).encode())
    assert all(math.prod(box["shape"]) for box in content["boxes"])
