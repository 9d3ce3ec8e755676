"""A small corpus for runs of the trainer, and a guard against what a module leaves behind."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

_WORDS = "def return for in if else self value index list dict print range token expert".split()


@pytest.fixture(autouse=True, scope="module")
def no_process_group_left() -> Iterator[None]:
    """A process has one default group: who leaves it breaks a module that runs later."""
    yield
    assert not dist.is_initialized(), "a test of this module left its process group"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 text files of unequal length."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for i in range(60):
        lines = [
            " ".join(rng.choices(_WORDS, k=rng.randint(2, 9))) + f" {rng.randint(0, 99)}"
            for _ in range(rng.randint(3, 60))
        ]
        (folder / f"{i:03}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def overrides(corpus: Path, tmp_path: Path) -> list[str]:
    """Overrides that point tests/tiny.toml to the corpus and to folders of this test."""
    return [
        f"--data.source={corpus}",
        f"--data.cache_dir={corpus.parent / 'corpus-cache'}",
        f"--run.dir={tmp_path / 'run'}",
    ]
