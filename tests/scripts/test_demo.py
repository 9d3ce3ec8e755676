"""The final output of `make demo`."""

import json
from pathlib import Path

from scripts.demo import REFERENCE, comparison


def write(folder: Path, speeds: list[float]) -> None:
    lines = [{"tokens_per_s": speed} for speed in speeds]
    lines[-1] |= {"step": 7, "validation_loss": 4.5, "validation_bits_per_byte": 1.9}
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    attempts = [{"ranks": 9}, {"ranks": 2, "cores": 4, "device": "Some CPU"}]
    (folder / "environment.json").write_text(json.dumps(attempts))


def test_the_machine_is_compared_with_the_reference(tmp_path: Path) -> None:
    reference = REFERENCE["tokens_per_s"]
    write(tmp_path, [1, 2 * reference, 9 * reference])
    said = comparison(tmp_path, as_shipped=True)
    assert "after 7 steps; reference" in said
    assert "on 2 ranks, 4 cores, Some CPU: 2.00 times the reference" in said
    assert REFERENCE["machine"] in said


def test_a_changed_experiment_has_no_reference_loss(tmp_path: Path) -> None:
    write(tmp_path, [100])
    assert "after 7 steps\n" in comparison(tmp_path, as_shipped=False)
