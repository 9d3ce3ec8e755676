"""A CPU without Triton trains, serves and quantizes; CUDA without it is refused with what to
install."""

import importlib.util
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from kernels.device import missing_triton
from parallel import ranks
from serve.engine import loading
from tests import forks
from tests.runs import TINY, run

CODE = """
import sys
sys.modules["triton"] = None
for name in [name for name in sys.modules if name.startswith("triton.")]:
    del sys.modules[name]
import serve.api.app, serve.cuda.runner, serve.engine.core, scripts.validate
from train.__main__ import main
sys.argv[1:] += ["--train.steps=1", "--schedule.warmup_steps=0", "--precision.recipe=fp8_blockwise",
                 "--model.d_model=128", "--model.attention.head_dim=128",
                 "--model.moe.d_expert=128"]
sys.exit(main(sys.argv[1:]))
"""


def test_a_cpu_needs_no_triton(overrides: list[str], tmp_path: Path) -> None:
    done = run("-c", CODE, TINY, *overrides, modules=forks.TORCH)
    assert "step" in done.stdout and (tmp_path / "run" / "metrics.jsonl").exists()


def test_cuda_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_triton() == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: 0)
    for start in (
        ranks.start_ranks,
        lambda: loading._device("cuda"),
        lambda: loading._device("auto"),
    ):
        with pytest.raises(UserError, match="pip install 'triton"):
            start()
