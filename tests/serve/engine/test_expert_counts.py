"""Counted choices of experts equal those that are reported token by token."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.step_context import MicrobatchContext
from serve.cache.kv_cache import KvCache
from serve.cuda.runner import CudaRunner
from serve.engine.batch import lay_out
from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import open_export
from serve.engine.runner import ModelRunner
from tests.models.families import FAMILIES
from tests.models.test_invariance import lively
from tests.serve.drive import complete, greedy, make_request, run

MakeCore = Callable[..., EngineCore]


def counted(ids_TLK: np.ndarray, n_experts: int) -> np.ndarray:
    """`[L, E]` of the choices of tokens."""
    layers = ids_TLK.transpose(1, 0, 2).reshape(ids_TLK.shape[1], -1)
    return np.stack([np.bincount(ids, minlength=n_experts) for ids in layers])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_every_computed_token_is_counted_once(two_layers: Path, dtype: str, overlap: str) -> None:
    """bf16 is counted by the C++ kernel where it is used. Nothing is cached, so each token is
    computed once, in steps of odd sizes; with overlap tokens of ended requests would be more."""
    export = open_export(two_layers, dtype, "cpu")
    options = EngineOptions(
        routed_experts=True, cache="naive", kv_tokens=2048, max_batch_tokens=17,
        overlap=overlap,  # type: ignore[arg-type]
    )  # fmt: skip
    core = EngineCore(export, options)
    assert core.inputs.info.moe_layers == (0, 1)
    assert not core.expert_counts().any(), "the comparison at the start is not counted"
    rng = random.Random(dtype)
    params = greedy(5, return_routed_experts=True)
    prompts = [[rng.randrange(1, 300) for _ in range(n)] for n in (1, 2, 7, 8, 9, 31, 40)]
    requests = [make_request(core, prompt, params) for prompt in prompts]
    run(core, requests)
    core.close()
    expected = sum(counted(r.routed_experts, 4) for r in requests if r.routed_experts is not None)
    assert np.array_equal(core.expert_counts(), expected)
    assert core.expert_counts().sum() == sum(len(p) + 4 for p in prompts) * 2 * 2


def test_without_reports_the_counts_are_the_same(make_core: MakeCore) -> None:
    found = []
    for more in ({}, {"routed_experts": True}):
        core = make_core(max_batch_tokens=19, **more)
        complete(core, [[5, 6, 7] * 9, [5, 6, 7] * 8 + [9], [8]], greedy(6))
        found.append(core.expert_counts())
    assert found[0].any() and np.array_equal(found[0], found[1])


def test_new_weights_are_counted_from_zero(make_core: MakeCore, export_folder: Path) -> None:
    core = make_core()
    complete(core, [[5, 6, 7]], greedy(6))
    core.update_weights(export_folder)
    assert not core.expert_counts().any()


@pytest.mark.parametrize("family", ["qwen3", "deepseek-v3", "gpt-oss"])
def test_padding_of_a_graph_is_not_counted(family: str) -> None:
    """Three decodes in the buffers for four; dense layers have no row."""
    config = FAMILIES[family]
    decoder, cpu = lively(config, torch.float32), torch.device("cpu")
    caches = [KvCache(config, 10, 8, torch.float32, cpu) for _ in range(2)]
    plain = ModelRunner(decoder, caches[0], fuses=False)
    with_graphs = CudaRunner(decoder, caches[1], max_running=4, max_pages=3)
    contexts = []
    for start, end in ((0, 5), (5, 6), (6, 7)):
        chunks = [([n + 3 for n in range(start, end)], start, [b + 1]) for b in range(3)]
        batch = lay_out(chunks, 8, range(3))
        plain.run(batch)
        with_graphs.run(batch)
        contexts.append(len(batch.tokens))
    assert with_graphs.graphs is not None and with_graphs.graphs.fits(batch)
    n_moe = MicrobatchContext.recording(config).layers
    n_layers = sum(layer is not None for layer in n_moe[: config.n_layers])
    counts = plain.expert_counts()
    assert counts.shape == (n_layers, config.moe.n_experts)
    assert (counts.sum(1) == sum(contexts) * config.moe.top_k).all()
    assert np.array_equal(counts, with_graphs.expert_counts())


def test_a_model_without_experts_has_no_counts() -> None:
    config = FAMILIES["qwen3"]
    dense = replace(config, n_dense_layers=config.n_layers, d_ff=32)
    cache = KvCache(dense, 4, 8, torch.float32, torch.device("cpu"))
    runner = ModelRunner(lively(dense, torch.float32), cache, fuses=False)
    runner.run(lay_out([([3, 4], 0, [1])], 8, [1]))
    assert runner.expert_counts().shape == (0, 0)
