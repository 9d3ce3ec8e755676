"""`kill -9` while a checkpoint is written, of ranks and of writer processes: the newest checkpoint
loads, and the run ends with the bits of one that was never killed."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.runs import TINY, run, started
from train.checkpoint.storage.local import LocalStorage

STEPS = 6


def children(pid: int) -> list[int]:
    """The processes that `pid` started, its writer process among them."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(n) for task in tasks for n in (task / "children").read_text().split()]
    except OSError:
        return []


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def newest_sound(root: Path) -> int:
    """The step of the newest checkpoint, which must be sound; 0 if there is none."""
    storage = LocalStorage(root)
    names = storage.names()
    if not names:
        return 0
    assert not storage.faults(names[-1], 0, 1), names[-1]
    return int(names[-1][5:])


def weights(root: Path) -> dict[str, bytes]:
    newest = root / f"step-{STEPS:08d}"
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


KINDS = ["rank", "ranks", "writer", "writers"]
FEW = ["ranks", "writers"]
"""The first ends a run; the next continues it, and it completes without its writers."""
MANY = random.Random(50).choices(KINDS, k=50)


@pytest.mark.long
@pytest.mark.parametrize(
    "kinds", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_the_newest_checkpoint_loads(
    kinds: list[str], overrides: list[str], tmp_path: Path
) -> None:
    kills = len(kinds)
    words = ["-m", "train", TINY, *overrides, "--model.d_model=128", "--checkpoint.every=1"]
    words += [f"--train.steps={STEPS}", "--precision.recipe=fp32"]
    whole, rng = tmp_path / "whole", random.Random(kills)
    once = [f"--checkpoint.every={STEPS}", "--checkpoint.async_save=false"]
    run(*words, f"--run.dir={whole}", *once, ranks=2)
    done = within = runs = 0
    while done < kills:
        folder = tmp_path / f"run-{runs}"
        runs += 1
        root, is_complete = folder / "checkpoints", False
        while not is_complete and done < kills:
            before = newest_sound(root)
            with started(*words, f"--run.dir={folder}", ranks=2) as program:
                target = before + rng.randint(1, 3)
                partial = root / f".step-{target:08d}.partial"
                while program.is_running() and not partial.exists():
                    time.sleep(0.0005)
                time.sleep(rng.choice([0, 0.002, 0.01, 0.03]) * rng.random())
                inside = bool(list(root.glob(".step-*")))
                pids = list(program.pids)
                writers = [child for pid in pids for child in children(pid)]
                kind = kinds[done]
                chosen = {"rank": pids[:1], "ranks": pids, "writer": writers[:1]}
                for pid in chosen.get(kind, writers):
                    kill(pid)
                if kind.startswith("writer"):  # training continues; the save is repeated
                    program.finish(60)
                else:
                    program.signal(signal.SIGKILL)
                    program.finish(60)
            found = newest_sound(root)
            assert found >= before, "a complete checkpoint was lost"
            done, within = done + 1, within + inside
            is_complete = found == STEPS
            if is_complete:
                assert weights(root) == weights(whole / "checkpoints")
    print(f"{done} kills, {within} within a save: newest loads {done}/{done}, {runs} runs")
    assert within > kills // 3
