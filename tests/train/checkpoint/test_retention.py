"""Which checkpoints a save removes, whatever other entries are in the folder."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from parallel.ranks import Ranks, start_ranks, stop_ranks
from train.checkpoint import checkpoint, retention
from train.checkpoint.checkpoint import CheckpointError, Retention
from train.checkpoint.storage import local
from train.checkpoint.storage.local import LocalStorage

RANKS: Ranks


@pytest.fixture(autouse=True, scope="module")
def ranks() -> Iterator[None]:
    global RANKS
    RANKS = start_ranks(threads=1)
    yield
    stop_ranks()


@pytest.fixture(autouse=True)
def as_after_a_restart() -> None:
    retention._SOUND.clear()


def save(root: Path, step: int, keep: int | None = 99, said: list[str] | None = None) -> Path:
    tensors = {"w": torch.full((4,), float(step))}
    say = (lambda line: None) if said is None else said.append
    rule = None if keep is None else Retention(keep)
    return Path(checkpoint.save(root, tensors, {"step": step}, {}, rule, RANKS, say))


def flip(folder: Path) -> None:
    """Flip one bit of the tensor file; its size stays."""
    file = folder / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def cut(folder: Path) -> None:
    file = folder / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def steps(root: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in root.glob("step-*"))


def sound(root: Path) -> list[int]:
    found = []
    for path in root.glob("step-*"):
        try:
            checkpoint.verify_files(checkpoint.read_manifest(path))
            found.append(int(path.name[5:]))
        except CheckpointError:
            pass
    return sorted(found)


@pytest.mark.parametrize("damage", [damage_manifest, cut, flip])
@pytest.mark.parametrize("restarted", [False, True])
def test_damaged_ones_do_not_count(damage: object, restarted: bool, tmp_path: Path) -> None:
    save(tmp_path, 6), save(tmp_path, 8)
    damage(tmp_path / "step-00000008")  # type: ignore[operator]
    if restarted:
        retention._SOUND.clear()
    save(tmp_path, 7, keep=1)
    assert sound(tmp_path) == [7]
    save(tmp_path, 9, keep=2)
    assert sound(tmp_path) == [7, 9]
    damage(tmp_path / "step-00000009")  # type: ignore[operator]
    save(tmp_path, 10, keep=2)
    assert sound(tmp_path) == [7, 10], "what this process wrote is looked at again once changed"


def test_never_fewer_than_keep_and_never_the_new_one(tmp_path: Path) -> None:
    rng = random.Random(0)
    for trial in range(15):
        root = tmp_path / str(trial)
        existing = sorted(rng.sample(range(1, 20), rng.randint(0, 7)))
        for step in existing:
            folder = save(root, step)
            if rng.random() < 0.4:
                rng.choice([damage_manifest, cut, flip])(folder)
        if rng.random() < 0.5:
            retention._SOUND.clear()
        before = sound(root)
        step = rng.choice([s for s in range(1, 25) if s not in before])
        keep = rng.randint(1, 4)
        save(root, step, keep=keep)
        older = [s for s in before if s < step]
        newer = [s for s in before if s > step]
        stay = older[max(len(older) - (keep - 1), 0) :] if keep > 1 else []
        assert sound(root) == sorted([*stay, step, *newer]), (trial, before, step, keep)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the checkpoints that are compared with their manifests."""
    names: list[str] = []
    compare = local.faults_of

    def counted(folder: Path, rank: int = 0, world: int = 1) -> dict[str, str]:
        names.append(folder.name)
        return compare(folder, rank, world)

    monkeypatch.setattr(local, "faults_of", counted)
    return names


def test_only_as_many_are_read_as_needed(tmp_path: Path, read: list[str]) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    retention._SOUND.clear()
    save(tmp_path, 6, keep=3)
    assert read == ["step-00000005", "step-00000004"] and steps(tmp_path) == [4, 5, 6]
    save(tmp_path, 7, keep=3), save(tmp_path, 8, keep=4)
    assert len(read) == 2, "what is known is not read again, nor what nothing depends on"


@pytest.mark.parametrize("damaged", [False, True])
def test_a_checkpoint_found_sound_at_resume_is_not_read_again(
    damaged: bool, tmp_path: Path, read: list[str]
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    retention._SOUND.clear()
    storage = LocalStorage(tmp_path)
    retention.remember(storage.address("step-00000003"), storage.signature("step-00000003"))
    if damaged:  # after it was compared
        flip(tmp_path / "step-00000003")
    save(tmp_path, 4, keep=2)
    assert steps(tmp_path) == ([2, 3, 4] if damaged else [3, 4])
    assert read == (["step-00000003", "step-00000002"] if damaged else [])


def test_every_nth_stays_forever_and_the_best_by_validation(tmp_path: Path) -> None:
    rng = random.Random(0)
    for trial in range(8):
        root, losses = tmp_path / str(trial), dict[int, float]()
        rule = Retention(rng.randint(1, 3), rng.choice([0, 3, 4]), rng.randint(0, 2))
        damaged: set[int] = set()
        for step in range(1, 13):
            state: dict[str, object] = {"step": step}
            if rng.random() < 0.6:
                losses[step] = round(rng.random(), 1)
                state["validation_loss"] = losses[step]
            checkpoint.save(root, {"w": torch.ones(2)}, state, {}, rule, RANKS)
            newest = [s for s in range(step, 0, -1) if s not in damaged][: rule.keep]
            present = steps(root)
            assert set(newest) <= set(present)
            if rule.every:
                assert {s for s in range(1, step + 1) if s % rule.every == 0} <= set(present)
            if step == 6 and rng.random() < 0.5:
                flip(root / "step-00000006")
                damaged = {6}
        if not damaged:
            kept = set(newest)
            # a checkpoint that was neither best nor new once does not come back
            best = sorted(losses, key=lambda s: (losses[s], -s))[: rule.best]
            forever = {s for s in range(1, 13) if rule.every and s % rule.every == 0}
            assert set(best) <= set(present)
            assert set(present) == kept | forever | set(best), (trial, rule, losses)


def test_leftovers_of_any_kind_do_not_stop_a_save(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    outside.mkdir()
    root.mkdir()
    (outside / "precious").write_text("kept")
    (root / ".step-00000005.partial").write_text("a file")
    (root / ".step-00000006.partial").symlink_to(outside)
    (root / ".step-00000007.leaving").symlink_to(tmp_path / "nowhere")
    locked = root / ".step-00000008.partial"
    (locked / "inner").mkdir(parents=True)
    (locked / "inner" / "file").write_text("")
    (locked / "link").symlink_to(outside)
    os.mkfifo(locked / "fifo")
    (locked / "inner").chmod(0o500)
    locked.chmod(0o500)
    save(root, 9)
    assert [path.name for path in root.iterdir()] == ["step-00000009"]
    assert (outside / "precious").read_text() == "kept"


def test_what_cannot_be_removed_does_not_stop_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    save(tmp_path, 1)
    (tmp_path / ".step-00000002.partial").mkdir()
    rmdir, unlink = Path.rmdir, Path.unlink

    def refuse(path: Path, *arguments: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "rmdir", refuse), monkeypatch.setattr(Path, "unlink", refuse)
    save(tmp_path, 2, keep=1, said=said)
    assert sound(tmp_path) == [2]
    assert len(said) == 1 and "cannot be removed" in said[0] and "step-00000001" in said[0]
    monkeypatch.setattr(Path, "rmdir", rmdir), monkeypatch.setattr(Path, "unlink", unlink)
    save(tmp_path, 3, keep=2)
    assert not list(tmp_path.glob(".step-*")), "the next save clears it"


def test_links_are_neither_followed_nor_removed_nor_counted(tmp_path: Path) -> None:
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "root"
    target = save(elsewhere, 3)
    save(root, 1), save(root, 2)
    (root / "step-00000003").symlink_to(target)
    (root / "step-00000004").symlink_to(tmp_path / "nowhere")
    save(root, 5, keep=2)
    assert steps(root) == [2, 3, 4, 5] and sound(elsewhere) == [3]


def test_a_name_that_is_no_checkpoint_gives_way(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").write_text("a file")
    (tmp_path / "step-00000002").symlink_to(tmp_path / "nowhere")
    (tmp_path / "step-00000003").mkdir()
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip(tmp_path / "step-00000003")
    save(tmp_path, 3)
    assert sound(tmp_path) == [1, 2, 3] and not list(tmp_path.glob(".*"))
    with pytest.raises(CheckpointError, match=r"step-00000003: cannot write .*exists already"):
        save(tmp_path, 3)


def test_checkpoints_are_ordered_by_step(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    assert checkpoint.find(tmp_path).name == "step-100000000"


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(CheckpointError, match=r"step-00000001.*No space left") as caught:
            save(tmp_path, 1)
    assert "None" not in str(caught.value) and not list(tmp_path.iterdir())
    usage = os.statvfs(tmp_path)
    nearly_full = os.statvfs_result([*usage[:4], 0, *usage[5:]])
    monkeypatch.setattr("os.statvfs", lambda path: nearly_full)
    with pytest.raises(CheckpointError, match=r"no space: \d+ bytes are needed, 0 are free"):
        save(tmp_path, 1)
    assert not list(tmp_path.iterdir())
