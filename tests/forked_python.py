"""A Python that has the modules of transformers loaded, for programs that are given the path of an
interpreter: `forked_python.py [-P] FILE ARGUMENTS` runs FILE in a fork."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import forks


def interpreter(folder: Path) -> str:
    """Write a program into `folder` that is used like `sys.executable`; returns its path."""
    if not forks.POSSIBLE:
        return sys.executable
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" "$@"\n')
    path.chmod(0o755)
    return str(path)


if __name__ == "__main__":
    done = forks.forked(
        sys.argv[1:], dict(os.environ), forks.THEIRS, ranks=1, timeout=600, more={}, cwd=Path.cwd()
    )
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    sys.exit(done.returncode)
