"""The engine on a CUDA device: greedy tokens are the training model's, with graphs and without."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch

from models.decoder import Decoder
from serve.cache.kv_cache import KvCache
from serve.cuda.runner import CudaRunner
from serve.engine.batch import lay_out
from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import open_export
from serve.engine.runner import ModelRunner
from tests.models.families import FAMILIES
from tests.models.test_invariance import lively
from tests.serve.drive import complete, greedy
from tests.serve.test_runner import SERVED

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("graphs", ["auto", "off"])
def test_greedy_tokens(
    export_folder: Path,
    greedy_reference: Callable[[Sequence[int], int], list[int]],
    graphs: Literal["auto", "off"],
) -> None:
    export = open_export(export_folder, device="cuda")
    core = EngineCore(export, EngineOptions(kv_tokens=4096, max_running=6, cuda_graphs=graphs))
    assert isinstance(core.executor.runner, CudaRunner) and core.overlap
    rng = random.Random(0)
    texts = [[rng.randrange(1, 320) for _ in range(rng.randint(1, 60))] for _ in range(9)]
    found = complete(core, texts, [greedy(n) for n in range(5, 14)])
    expected = [greedy_reference(text, n) for n, text in enumerate(texts, 5)]
    assert [one.tokens for one in found] == expected


@pytest.mark.parametrize("name", SERVED)
def test_logits_of_every_family(name: str) -> None:
    """A prompt in two chunks, then decodes in a graph of two; against the CPU's runner in fp32."""
    config = FAMILIES[name]
    decoder, there = lively(config, torch.float32), lively(config, torch.float32).cuda()
    caches = [KvCache(config, 40, 5, torch.float32, torch.device(d)) for d in ("cpu", "cuda")]
    plain, runner = ModelRunner(decoder, caches[0], fuses=False), _graphs(there, caches[1])
    tokens = torch.randint(0, 90, (2, 60)).tolist()
    pages = [list(range(1, 14)), list(range(14, 27))]
    for start, end in ((0, 31), (31, 50), *((i, i + 1) for i in range(50, 60))):
        chunks = [(tokens[b][start:end], start, pages[b]) for b in range(2)]
        batch = lay_out(chunks, 5, range(2 * (end - start)))
        expected = plain.run(batch)
        assert (runner.run(batch).cpu() - expected).norm() < 1e-4 * expected.norm(), start


def _graphs(decoder: Decoder, cache: KvCache) -> CudaRunner:
    runner = CudaRunner(decoder, cache, 4, 13)
    assert runner.graphs is not None and sorted(runner.graphs.captured) == [1, 2, 4]
    return runner
