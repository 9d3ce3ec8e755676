"""Leaves the pictures out of every training run of this process and of its forks: they take a
quarter of a second at the end of a run, a third of a short one. For templates of forks.

A program whose environment is that of `tests.runs.PICTURES` draws.
"""

import os
from pathlib import Path

from tests.runs import PICTURES
from train.report import reporter

_DRAW = reporter.draw


def draw(folder: Path) -> list[Path]:
    """The pictures of a run that asks for them."""
    return _DRAW(folder) if PICTURES.items() <= os.environ.items() else []


reporter.draw = draw
