"""CPUs with AMX: training uses it, serving does not."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runs import TINY, environment
from train.report.metrics import read_lines

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(), reason="needs a CPU with AMX"
)


def python(words: list[str], isa: str | None) -> subprocess.CompletedProcess[str]:
    """A new process, because oneDNN reads the variable once."""
    env = {k: v for k, v in environment().items() if not k.endswith("_MAX_CPU_ISA")}
    if isa is not None:
        env["ONEDNN_MAX_CPU_ISA"] = isa
    return subprocess.run(
        [sys.executable, *words], env=env, capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize(("isa", "compiled"), [(None, True), ("DEFAULT", False)])
def test_serving_computes_in_the_order_of_its_kernel(isa: str | None, compiled: bool) -> None:
    """Without a limit of the user's, `import serve` sets one; else the kernel is not used."""
    code = "import serve; from kernels.fused_cpu.build import library; print(library() is not None)"
    done = python(["-c", code], isa)
    assert done.stdout == f"{compiled}\n"
    assert ("oneDNN adds in another order" in done.stderr) != compiled


def test_training_uses_amx(tmp_path: Path) -> None:
    """The losses have other bits without it and agree within bf16's precision (2^-8)."""
    found = []
    for isa in (None, "AVX512_CORE_BF16"):
        folder = tmp_path / str(isa)
        python(
            ["-m", "train", str(TINY), f"--run.dir={folder}", "--precision.recipe=bf16",
             "--model.d_model=256", "--train.steps=2", "--validation.every=0"], isa,
        )  # fmt: skip
        found.append([line["loss"] for line in read_lines(folder / "metrics.jsonl")])
    assert found[0] != found[1]
    assert found[0] == pytest.approx(found[1], rel=2**-8)
