"""The committed job scripts and manifests are those that the renderer makes now, bash can read the
scripts, and docs/launch.md has each of them. tests/launch/test_kubernetes.py checks manifests."""

import shutil
import subprocess

import pytest

from launch.write_examples import EXAMPLES, FOLDER, example
from tests.runs import ROOT


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_current(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert text == example(name), "run python -m launch.write_examples"
    if name.endswith(".sbatch") and shutil.which("bash"):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert f"`{name}`" in (ROOT / "docs" / "launch.md").read_text()


def test_every_example_is_made_by_the_renderer() -> None:
    committed = {path.name for path in FOLDER.iterdir() if path.suffix != ".toml"}
    assert committed == {*EXAMPLES}
