"""Training steps and the server's steps on CUDA without CUDA: no tensor on the wrong device, no
wrong type, no operator without a fake form, no operand that TMA cannot read; and the host waits for
the device only where it is documented.

The walks run in a process of their own, because torch starts its threads once per process.
"""

import json
import re
from collections import Counter
from typing import Any

import pytest

from tests import forks
from tests.on_cuda.walk import every, few
from tests.runs import run

STEP = {
    "train/step.py train_step", "models/balance.py mean_losses",
    "parallel/dispatch/stats.py dispatch_fields", "parallel/dispatch/overflow.py overflowed",
}  # fmt: skip
"""Where a training step reads results, once per step."""
LAYER = {
    "parallel/dispatch/all_to_all.py plan", "parallel/dispatch/hierarchical.py plan",
}  # fmt: skip
"""Where the exact exchanges read the splits of a layer."""


def walked(*names: str) -> list[dict[str, Any]]:
    done = run("-m", "tests.on_cuda.walk", *names, modules=forks.TORCH)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert found, done.stderr
    return found


def waits(result: dict[str, Any]) -> Counter[str]:
    """Waits of the host by file and function."""
    found: Counter[str] = Counter()
    for place, n in result["reads"].items():
        found[re.sub(r":\d+ (\S+) .*", r" \1", place)] += n
    return found


def assert_sound(result: dict[str, Any]) -> None:
    name, found = result["name"], waits(result)
    assert not result["fault"], f"{name}: {result['fault']}, in {result['place']}"
    assert not result["spilled"], f"{name}: registers spilled in {result['spilled']}"
    if result["refused"]:
        return
    assert result["launched"] and result["operators"], name
    exact = "kind=sync_free" not in name and re.search(r" [2-9]\d* ranks", name) is not None
    allowed = (STEP | LAYER if exact else STEP) if "serve" not in name else set()
    assert not found.keys() - allowed, f"{name}: the host waits at {found}"
    if exact:
        layers, chunks = result["operators"]["phalanx::route"], 2 if "chunks=2" in name else 1
        assert 0 < sum(found[place] for place in LAYER) <= layers * chunks, (name, found)


def test_the_steps_of_a_few_models() -> None:
    results = walked()
    assert [result["name"] for result in results] == [walk.name for walk in few()]
    for result in results:
        assert not result["refused"]
        assert_sound(result)
    plain, fp8, sync_free, served = (result["operators"] for result in results)
    assert plain["phalanx::grouped_gemm_tn"] and fp8["phalanx::grouped_gemm_fp8_tn"]
    assert fp8["phalanx::gemm_fp8"] and sync_free["phalanx::permutation"]
    assert served["phalanx::rms_norm"] and results[3]["launched"]["_attend"]
    assert sum(waits(results[0]).values()) <= 9, "of the step itself, for any number of layers"


@pytest.mark.slow
def test_the_steps_of_all_models() -> None:
    """Every tiny family and four of true size, whose kernels are compiled; meshes, dispatchers,
    recomputation, both recipes; the server."""
    results = walked("all")
    assert len(results) == len([*every()])
    for result in results:
        assert_sound(result)
    refused = [result["name"] for result in results if result["refused"]]
    assert all("fp8_blockwise" in name for name in refused) and len(refused) < len(results) / 4


MUTATIONS = {
    "a tensor on the CPU": (
        "patch('models.decoder.rope_tables', lambda *a: tuple("
        "torch.zeros(x.shape) for x in rope_tables(*a)))",
        r"Fault: .*\.py:\d+ \w+: .* on cuda:0.* on cpu, made by aten\.\w+",
    ),
    "a wrong dtype": (
        "patch('kernels.layers.norm_triton.forward', lambda x, w, e: "
        "(torch.empty_like(x, dtype=torch.float32), x.new_empty(len(x), dtype=torch.float32)))",
        r"Fault: phalanx::rms_norm: its kernel returns .*float32.* its fake form .*bfloat16",
    ),
    "an operand that TMA cannot read": (
        "patch('kernels.gemm.gemm_fp8_triton.k_major', lambda x, target: "
        "x.new_empty(x.shape[0], x.shape[1] + 1)[:, :x.shape[1]])",
        r"(AssertionError|Fault).*|.*16-byte.*",
    ),
    "an operator without a fake form": (
        "patch('models.layers.norm.rms_norm', lambda x, w, e: torch.ops.phalanx.unfinished(x))",
        r"\w+: .*no fake impl",
    ),
    "a read": (
        "patch('models.router.Router._given_choice', "
        "lambda self, logits: None if logits.max().item() else None)",
        "",
    ),
}  # fmt: skip
"""What is changed, and the fault."""


def test_each_kind_of_fault_is_found() -> None:
    """With its place in the code; a read among the waits."""
    changes = ", ".join(f"{name!r}: lambda: {change}" for name, (change, _) in MUTATIONS.items())
    code = f"""
import json
from unittest.mock import patch
import torch
from models.layers.rope import rope_tables
from tests.on_cuda import walk

@torch.library.custom_op("phalanx::unfinished", mutates_args=())
def unfinished(x: torch.Tensor) -> torch.Tensor:
    return x.clone()

for name, mutation in {{{changes}}}.items():
    of = walk.few()["TMA" in name]
    print(json.dumps(walk.run(of, mutation).__dict__ | {{"mutation": name}}))
"""
    done = run("-c", code, modules=forks.TORCH)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    results = {result["mutation"]: result for result in lines}
    assert results.keys() == MUTATIONS.keys()
    for name, (_, expected) in MUTATIONS.items():
        result = results[name]
        if expected:
            assert re.match(expected, result["fault"]), (name, result)
            assert any(".py:" in place for place in result["place"])
            continue
        assert not result["fault"], result
        # three layers, in each of the microbatches that are traced
        assert waits(result)["models/router.py _route"] == 6, result["reads"]
        with pytest.raises(AssertionError, match="the host waits"):
            assert_sound(result)
