"""Checkpoints: exact, complete, and every kind of damage is detected."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.layers.box import Box
from parallel.ranks import Ranks, start_ranks, stop_ranks
from train.checkpoint import checkpoint
from train.checkpoint.checkpoint import CheckpointError, Retention
from train.checkpoint.manifest_content import crc32_of

RANKS: Ranks


@pytest.fixture(autouse=True, scope="module")
def ranks() -> Iterator[None]:
    global RANKS
    RANKS = start_ranks(threads=1)
    yield
    stop_ranks()


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "matrix": torch.randn(5, 7, generator=generator),
        "cube": torch.randn(3, 2, 4, generator=generator).bfloat16(),
        "scalar": torch.tensor(3.25),
        "empty": torch.zeros(0, 3),
    }


def save(root: Path, step: int, seed: int = 0, keep: int = 3) -> Path:
    rule = Retention(keep)
    state, config = {"step": step}, {"train.steps": 9}
    return Path(checkpoint.save(root, tensors(seed), state, config, rule, RANKS))


def test_round_trip_and_pruning(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, seed=step, keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert not list(tmp_path.glob(".*")), "no partial folder stays"
    manifest = checkpoint.read_manifest(checkpoint.find(tmp_path))
    checkpoint.verify_files(manifest)
    target = tensors(seed=99)
    checkpoint.load(manifest, target)
    for name, value in tensors(seed=3).items():
        assert torch.equal(target[name], value) and target[name].dtype == value.dtype
    assert manifest.step == 3 and manifest.config == {"train.steps": 9}


def test_any_box_can_be_read(tmp_path: Path) -> None:
    reader = checkpoint.Reader(checkpoint.read_manifest(save(tmp_path, 1)))
    rng = random.Random(0)
    whole = tensors()["matrix"]
    for _ in range(50):
        offset = (rng.randrange(5), rng.randrange(7))
        shape = (rng.randint(1, 5 - offset[0]), rng.randint(1, 7 - offset[1]))
        box = Box((5, 7), offset, shape)
        assert torch.equal(reader.read("matrix", box), whole[box.slices()])


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    rng = random.Random(0)
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        for _ in range(40):
            damaged = bytearray(content)
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError) as caught:
                manifest = checkpoint.read_manifest(folder)
                checkpoint.verify_files(manifest)
            assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
        file.write_bytes(content)
    checkpoint.verify_files(checkpoint.read_manifest(folder))


def test_truncated_missing_and_foreign_files(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    save(tmp_path, 2)
    file = folder / "rank-00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(
        CheckpointError, match=r"bytes, expected .*; remove .* to use step-00000002"
    ):
        checkpoint.read_manifest(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        checkpoint.read_manifest(folder)
    (folder / "manifest.json").unlink()
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000002"]
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoint.find(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint.find(tmp_path / "absent")


def test_a_file_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", 1)
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    (tmp_path / "secret").write_bytes(b"x")
    content["files"]["../../secret"] = {"bytes": 1, "crc32": 0}
    content.pop("crc32")
    content["crc32"] = crc32_of(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="secret: missing"):
        checkpoint.read_manifest(folder)


def test_another_shape_or_a_missing_part_is_named(tmp_path: Path) -> None:
    manifest = checkpoint.read_manifest(save(tmp_path, 1))
    with pytest.raises(CheckpointError, match=r"matrix has shape \[5, 7\], the model asks for"):
        checkpoint.load(manifest, {"matrix": torch.zeros(5, 8)})
    with pytest.raises(CheckpointError, match="has no tensor other"):
        checkpoint.load(manifest, {"other": torch.zeros(1)})
    box, file = manifest.boxes["matrix"][0]
    manifest.boxes["matrix"] = [(Box(box.whole, (0, 0), (4, 7)), file)]
    with pytest.raises(CheckpointError, match="matrix is incomplete: 28 of 35"):
        checkpoint.load(manifest, {"matrix": torch.zeros(5, 7)})


def test_a_disk_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        save(blocked, 1)
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        save(tmp_path, 1)  # never overwritten
    assert not checkpoint.checkpoints(tmp_path / "step-00000001")


def test_leftovers_of_a_killed_save_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".step-00000007.partial").mkdir()
    save(tmp_path, 8)
    assert not list(tmp_path.glob(".*"))


def test_overlapping_or_foreign_boxes_do_not_pass_for_the_whole(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    path = folder / "manifest.json"
    content = json.loads(path.read_text())

    def write(boxes: list[dict[str, object]]) -> None:
        changed = {key: value for key, value in content.items() if key != "crc32"}
        changed["boxes"] = boxes
        path.write_text(json.dumps(changed | {"crc32": crc32_of(changed)}))

    half: dict[str, object] = {
        "name": "matrix",
        "whole": [10, 7],
        "offset": [0, 0],
        "shape": [5, 7],
    }
    write([half | {"file": "rank-00000.safetensors"}] * 2)
    with pytest.raises(CheckpointError, match="matrix is incomplete: 35 of 70"):
        checkpoint.load(checkpoint.read_manifest(folder), {"matrix": torch.zeros(10, 7)})
    for wrong, expected in [
        (half | {"file": "../other.safetensors"}, "which is not listed"),
        (half | {"file": "rank-00000.safetensors", "offset": [6, 0]}, "leaves its tensor"),
    ]:
        write([wrong])
        with pytest.raises(CheckpointError, match=expected):
            checkpoint.read_manifest(folder)
