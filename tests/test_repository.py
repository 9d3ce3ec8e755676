"""The content of a clone: no links, no ignored files, no paths of a particular machine."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.runs import ROOT

MACHINE = re.compile(
    rb"(?<![\w.~$}>-])/(?:tmp|work|root|Users|home/[a-z]\w*)(?:/[\w.-]|\b(?=[`'\"]))"
)
"""An absolute path to a folder that exists only on one machine."""
pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="not a checkout: nothing is tracked or ignored"
)


def git(*arguments: str, cwd: Path = ROOT) -> list[str]:
    done = subprocess.run(
        ["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True, timeout=60
    )
    return [line for line in done.stdout.split("\0") if line]


def test_no_link_is_tracked() -> None:
    modes = git("ls-files", "-s", "-z")
    assert not [line for line in modes if line.split()[0] not in ("100644", "100755")]


def test_nothing_tracked_is_ignored() -> None:
    assert not git("ls-files", "-z", "--cached", "--ignored", "--exclude-standard")


def test_no_file_names_a_place_of_a_machine() -> None:
    found = []
    for name in git("ls-files", "-z"):
        path = ROOT / name
        if path.suffix != ".png" and path.is_file():
            found += [f"{name}: {match[0]!r}" for match in MACHINE.finditer(path.read_bytes())]
    assert not found


@pytest.mark.parametrize("place", ["tmp/model", "root/x", "home/ann/runs", "work/main"])
def test_a_place_of_a_machine_is_seen(place: str) -> None:
    for text in (f"--out /{place}", f"see `/{place}`", f"'/{place}'"):
        assert MACHINE.search(text.encode())
    assert not MACHINE.search(f"~/{place} https://host/{place} my/{place}".encode())


@pytest.mark.parametrize("name", [".venv", "runs", "cache", "__pycache__", "x.egg-info"])
def test_ignored_names_match_files_folders_and_links(name: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / ".gitignore", tmp_path)
    git("init", "-q", cwd=tmp_path)
    place = tmp_path / name
    for make in (Path.touch, Path.mkdir, lambda path: path.symlink_to("elsewhere")):
        make(place)
        if place.is_dir() and not place.is_symlink():
            (place / "file").touch()
        assert git("status", "-z", "--porcelain", cwd=tmp_path) == ["?? .gitignore"]
        shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()
