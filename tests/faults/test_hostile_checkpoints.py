"""Damaged and hostile files: each is refused by name, nothing is executed or written outside of the
folder, no memory is allocated for it, and the run starts from the checkpoint before."""

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from parallel.ranks import Ranks, start_ranks, stop_ranks
from tests.faults.checkpoint_folder import CheckpointFolder
from tests.faults.pickles import pickles
from tests.train.checkpoint.peak_memory import peak_memory
from train.checkpoint import resume

FIRST, SECOND, MANIFEST = "rank-00000.safetensors", "rank-00001.safetensors", "manifest.json"


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    yield start_ranks(threads=1)
    stop_ranks()


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Path], None]:
    """A manifest with a right checksum after a change of its content."""

    def damage(newest: Path, outside: Path) -> None:
        content = json.loads((newest / MANIFEST).read_text())
        content.pop("crc32")
        change(content)
        text = json.dumps(content, sort_keys=True)
        content["crc32"] = zlib.crc32(text.encode())
        (newest / MANIFEST).write_text(json.dumps(content))

    return damage


def matching(file: str, content: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    """A file with other content, and a manifest that has its size and checksum."""

    def damage(newest: Path, outside: Path) -> None:
        raw = content((newest / file).read_bytes())
        (newest / file).write_bytes(raw)
        facts = {"bytes": len(raw), "crc32": zlib.crc32(raw)}
        changed(lambda manifest: manifest["files"].update({file: facts}))(newest, outside)

    return damage


def replaced(file: str, content: bytes) -> Callable[[Path, Path], object]:
    return lambda newest, outside: (newest / file).write_bytes(content)


def swap(newest: Path, outside: Path) -> None:
    one, other = (newest / FIRST).read_bytes(), (newest / SECOND).read_bytes()
    (newest / FIRST).write_bytes(other), (newest / SECOND).write_bytes(one)


def stale(newest: Path, outside: Path) -> None:
    (newest / SECOND).write_bytes((newest.parent / "step-00000004" / SECOND).read_bytes())


def stale_manifest(newest: Path, outside: Path) -> None:
    (newest / MANIFEST).write_bytes((newest.parent / "step-00000004" / MANIFEST).read_bytes())


def fifo(file: str) -> Callable[[Path, Path], None]:
    def damage(newest: Path, outside: Path) -> None:
        (newest / file).unlink()
        os.mkfifo(newest / file)

    return damage


def linked(file: str, target: str) -> Callable[[Path, Path], None]:
    def damage(newest: Path, outside: Path) -> None:
        (newest / file).unlink()
        (newest / file).symlink_to(target.replace("OUTSIDE", str(outside)))

    return damage


def folder_instead(newest: Path, outside: Path) -> None:
    (newest / FIRST).unlink()
    (newest / FIRST).mkdir()


def header(length: int, text: bytes) -> Callable[[bytes], bytes]:
    """A file with this header in place of its own, with the length given."""
    return lambda raw: struct.pack("<Q", length) + text + raw[-200:]


def long_header(raw: bytes) -> bytes:
    text = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    return struct.pack("<Q", len(text)) + text


def with_entry(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["files"].update({name: {"bytes": 6, "crc32": 0}})


def first_box(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["boxes"][0].update(values)


HUGE = json.dumps({"a": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}})
CASES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "truncated file": (lambda n, o: os.truncate(n / FIRST, 100), FIRST),
    "one byte less": (lambda n, o: os.truncate(n / FIRST, (n / FIRST).stat().st_size - 1), FIRST),
    "longer file": (lambda n, o: os.truncate(n / FIRST, 10**6), FIRST),
    "sparse file of 1 TiB": (lambda n, o: os.truncate(n / FIRST, 2**40), FIRST),
    "empty file": (replaced(FIRST, b""), FIRST),
    "missing file": (lambda n, o: (n / SECOND).unlink(), SECOND),
    "swapped files": (swap, FIRST),
    "stale file": (stale, SECOND),
    "stale manifest": (stale_manifest, MANIFEST),
    "empty manifest": (replaced(MANIFEST, b""), MANIFEST),
    "truncated manifest": (lambda n, o: os.truncate(n / MANIFEST, 300), MANIFEST),
    "manifest of 1 TiB": (lambda n, o: os.truncate(n / MANIFEST, 2**40), MANIFEST),
    "manifest of zeros": (replaced(MANIFEST, bytes(4096)), MANIFEST),
    "manifest no UTF-8": (replaced(MANIFEST, b"\xff\xfe{}"), MANIFEST),
    "deep manifest": (replaced(MANIFEST, b"[" * 10**6), MANIFEST),
    "manifest a list": (replaced(MANIFEST, b"[]"), MANIFEST),
    "fifo as manifest": (fifo(MANIFEST), ""),
    "fifo as file": (fifo(FIRST), FIRST),
    "endless device": (linked(FIRST, "/dev/zero"), FIRST),
    "link to another's file": (linked(FIRST, "OUTSIDE/secret"), FIRST),
    "link to nothing": (linked(FIRST, "OUTSIDE/none"), FIRST),
    "folder as file": (folder_instead, FIRST),
    "path upwards": (changed(with_entry("../../outside/secret")), "secret"),
    "absolute path": (changed(with_entry("/etc/passwd")), "passwd"),
    "path with NUL": (changed(with_entry("a\0b")), MANIFEST),
    "endless name": (changed(with_entry("x" * 10**6)), MANIFEST),
    "box leaves tensor": (changed(first_box(offset=[9, 9])), MANIFEST),
    "negative offset": (changed(first_box(offset=[-1, 0])), MANIFEST),
    "huge tensor": (changed(first_box(whole=[2**61, 2**61])), MANIFEST),
    "boolean as size": (changed(first_box(shape=[True, 5])), MANIFEST),
    "box of a lost file": (changed(first_box(file="rank-00007.safetensors")), MANIFEST),
    "no boxes": (changed(lambda c: c.update(boxes=[])), "no tensor"),
    "half of the boxes": (changed(lambda c: c["boxes"].pop()), MANIFEST),
    "boxes twice": (changed(lambda c: c["boxes"].append(c["boxes"][0])), "overlap"),
    "step of another": (changed(lambda c: c["state"].update(step=4)), MANIFEST),
    "no state": (changed(lambda c: c.pop("state")), MANIFEST),
    "state of no run": (changed(lambda c: c["state"].pop("corpus")), "corpus"),
    "config of objects": (changed(lambda c: c["config"].update({"run.seed": {}})), MANIFEST),
    "config unknown": (changed(lambda c: c["config"].update({"run.evil": 1})), "run.evil"),
    "config wrong type": (changed(lambda c: c["config"].update({"run.seed": "x"})), "run.seed"),
    "other format": (changed(lambda c: c.update(format=99)), MANIFEST),
    "another dtype": (changed(first_box(dtype="I8")), MANIFEST),
    "header bomb": (matching(FIRST, header(2**63 - 1, b"{}")), FIRST),
    "header of 99 MB": (matching(FIRST, header(99 * 10**6, b"{}")), FIRST),
    "deep header": (matching(FIRST, long_header), FIRST),
    "header of no tensors": (matching(FIRST, header(2, b"{}")), FIRST),
    "header of a huge tensor": (matching(FIRST, header(len(HUGE), HUGE.encode())), FIRST),
    "file of zeros": (matching(FIRST, lambda raw: bytes(len(raw))), FIRST),
    "file of two bytes": (matching(FIRST, lambda raw: b"ab"), FIRST),
}


def always(content: bytes) -> Callable[[bytes], bytes]:
    return lambda raw: content


def with_source(content: bytes) -> Callable[[dict[str, Any]], object]:
    """A setting with these bytes; protocol 0 is printable, as a setting may be, so a NUL ends
    it."""
    setting = {"data.source": content.decode("latin-1") + "\0"}
    return lambda manifest: manifest["config"].update(setting)


def with_pickles(marker: Path) -> dict[str, tuple[Callable[[Path, Path], object], str]]:
    """Pickles in every place from which other loaders would read them."""
    cases: dict[str, tuple[Callable[[Path, Path], object], str]] = {}
    for protocol, bomb in pickles(marker).items():
        cases |= {
            f"pickle as manifest, {protocol}": (replaced(MANIFEST, bomb), MANIFEST),
            f"pickle as file, {protocol}": (matching(FIRST, always(bomb)), FIRST),
            f"pickle in config, {protocol}": (changed(with_source(bomb)), MANIFEST),
        }
    return cases


@pytest.mark.parametrize("case", [*CASES, *with_pickles(Path())])
def test_it_is_refused_by_name(
    case: str, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "_PAUSE_S", 0.0)
    marker, outside = tmp_path / "executed", tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    damage, named = (CASES | with_pickles(marker))[case]
    folder = CheckpointFolder(tmp_path / "run")
    folder.write(4)
    newest = folder.write(8)
    names = ("data.pkl", ".metadata", "__init__.py", "sitecustomize.py", "rank-9.pt")
    for name, bomb in zip(names, cycle(pickles(marker).values()), strict=False):
        (newest / name).write_bytes(bomb)
    damage(newest, outside)
    before = {path: path.lstat() for path in outside.rglob("*")}
    with peak_memory() as peak:
        start, live = folder.restart(ranks)
    assert start.done == 4 and folder.is_state(live, 4)
    if named:  # a fifo is no manifest, so the folder is no checkpoint
        told = [line for line in start.lines if line.startswith("damaged, not used: ")]
        assert len(told) == 1 and "step-00000008" in told[0] and named in told[0], start.lines
        assert told[0].isprintable() and len(told[0]) < 1100
        assert not newest.exists() and (folder.root / "damaged-step-00000008").is_dir()
    assert peak[0] < 64 * 2**20
    assert not marker.exists(), "executed"
    assert {path: path.lstat() for path in outside.rglob("*")} == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "outside"}
    assert {path.name for path in folder.root.parent.iterdir()} == {"checkpoints"}
