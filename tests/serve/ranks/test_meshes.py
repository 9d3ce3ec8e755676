"""A server of several ranks gives what one process gives, and the bits of the trainer's mesh.

Every case serves random chunks in random batches with a random order of pages, and the whole engine
with prefixes and reported experts (`mesh_run.py`).
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from configs.model import ModelConfig
from models.decoder import Decoder
from models.init import initialize
from tests.models.hf.test_fp8_blocks import write_fp8
from tests.runs import ROOT, run, started
from tests.serve.conftest import CONFIG
from tests.serve.test_runner import SERVED

Found = dict[str, Any]
LOGITS, LOGPROBS = 1e-5, 5e-5
"""fp32 on ranks of tp: sums over ranks have another order than in one process. The largest logit is
about 20, so a share of 1e-5 of it is 2e-4; measured are 2e-6 and 5e-6."""
MESHES = [(2, 1), (1, 2), (2, 2)]
"""tp and ep on two ranks."""
COVER = [(family, *MESHES[i % 3], ("fp32", "bf16")[i % 2]) for i, family in enumerate(SERVED)]
EVERY = [(f, *mesh, dtype) for f in SERVED for mesh in MESHES for dtype in ("fp32", "bf16")]
FOUR = [
    ("qwen3", 4, 1, "fp32"), ("gpt-oss", 2, 4, "bf16"), ("deepseek-v3", 2, 2, "fp32"),
    ("llama4", 4, 4, "fp32"), ("glm4", 1, 4, "bf16"), ("qwen3", 4, 2, "bf16"),
]  # fmt: skip


def compared(
    exports: Path, folder: Path, ranks: int, *cases: tuple[str, int, int, str]
) -> list[Found]:
    """What `mesh_run.compare` finds, for each case."""
    file, out = folder / "cases.json", folder / "out.json"
    keys = ("family", "tp", "ep", "dtype")
    file.write_text(json.dumps([dict(zip(keys, case, strict=True)) for case in cases]))
    program = ROOT / "tests" / "serve" / "ranks" / "mesh_run.py"
    run(program, exports, file, out, ranks=ranks, timeout=300)
    found: list[Found] = json.loads(out.read_text())
    assert len(found) == len(cases)
    return found


def assert_equal(found: Found, case: tuple[str, int, int, str]) -> None:
    """The bits of the trainer's mesh; those of one process without tp; else its fp32 values."""
    _, tp, _, dtype = case
    assert found["invariant"], case
    assert found["trainer"] or tp > 2, case
    if tp == 1:
        assert found["logits"] == found["logprobs"] == 0, case
    if tp == 1 or dtype == "fp32":
        assert found["tokens"] and found["experts"], case
        assert found["logits"] < LOGITS and found["logprobs"] < LOGPROBS, (case, found)
    assert_divided(found, case)


def assert_divided(found: Found, case: tuple[str, int, int, str]) -> None:
    """Every rank has its part of what tp and ep divide, and together they have all of it."""
    family, tp, ep, _ = case
    whole, cached = found["whole"]
    for held, cached_here in found["held"]:
        assert cached_here == (cached if family.startswith("deepseek") else cached // tp), case
        assert held < (0.6 if tp > 1 else 0.9) * whole, (case, held, whole)
        assert held >= whole // (tp * ep), case


@pytest.mark.long
def test_every_family(exports: Path, tmp_path: Path) -> None:
    """All in one run, because the start of the ranks costs as much as a case."""
    for found, case in zip(compared(exports, tmp_path, 2, *COVER), COVER, strict=True):
        assert_equal(found, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in EVERY if case not in COVER], ids=str)
def test_every_mesh(case: tuple[str, int, int, str], exports: Path, tmp_path: Path) -> None:
    assert_equal(compared(exports, tmp_path, 2, case)[0], case)


@pytest.mark.slow
@pytest.mark.parametrize("case", FOUR, ids=str)
def test_four_ranks(case: tuple[str, int, int, str], exports: Path, tmp_path: Path) -> None:
    """Sums of four, replicas of tp groups, divided widths of divided experts, experts twice."""
    assert_equal(compared(exports, tmp_path, 4, case)[0], case)


def fp8_model() -> ModelConfig:
    """Two ranks divide every weight into whole blocks."""
    attention = replace(CONFIG.attention, n_heads=4, n_kv_heads=4, head_dim=64)
    return replace(
        CONFIG, d_model=128, vocab_size=96, attention=attention,
        moe=replace(CONFIG.moe, d_expert=256, seq_aux_loss_coef=0.0),
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(
    "meshes", [[(2, 1), (1, 2)], pytest.param([(2, 2)], marks=pytest.mark.slow)], ids=str
)
def test_fp8_blocks(meshes: list[tuple[int, int]], tmp_path: Path) -> None:
    """The weights stay in FP8 on their rank, and logits are those of FP8 training on that mesh."""
    decoder, model = Decoder(fp8_model()), fp8_model()
    initialize(decoder, model, seed=0)
    write_fp8(decoder.eval(), tmp_path / "fp8")
    state = {name: tensor.contiguous() for name, tensor in decoder.state_dict().items()}
    save_file(state, tmp_path / "fp8.masters")
    cases = [("fp8", *mesh, "auto") for mesh in meshes]
    for found, mesh in zip(compared(tmp_path, tmp_path, 2, *cases), meshes, strict=True):
        assert found["trainer"], mesh
        if mesh[0] == 1:
            assert found["logits"] == 0 and found["tokens"], mesh


@pytest.mark.long
def test_blocks_are_not_cut(tmp_path: Path) -> None:
    model = replace(fp8_model(), moe=replace(fp8_model().moe, d_expert=128))
    decoder = Decoder(model)
    initialize(decoder, model, seed=0)
    write_fp8(decoder.eval(), tmp_path / "fp8")
    words = ["-m", "serve", "generate", tmp_path / "fp8", "--prompt", "x", "--tp", "2"]
    with started(*words, ranks=2) as cut, started(*words, "--dtype", "bf16", ranks=2) as whole:
        done, other = cut.finish(60), whole.finish(60)  # both at once, because they sleep
    assert (done.returncode, other.returncode) == (1, 1), (done, other)
    assert done.stderr.splitlines()[0] == (
        "error: --tp 2: layers.0.ffn.experts.w13 is divided into parts of 64 (of 128), which must "
        "be multiples of 128; use a smaller --tp, a larger --ep if it is an expert's weight, or "
        "--dtype bf16"
    )
    assert other.stderr.startswith("error: this model has no tokenizer; send token ids")
