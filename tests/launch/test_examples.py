"""The committed job scripts are those that the renderer makes now, and bash can read them."""

import shutil
import subprocess

import pytest

from launch.write_examples import EXAMPLES, FOLDER, example


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_current(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert text == example(name), "run python -m launch.write_examples"
    if shutil.which("bash"):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_every_example_is_made_by_the_renderer() -> None:
    assert {path.name for path in FOLDER.glob("*.sbatch")} == {*EXAMPLES}
