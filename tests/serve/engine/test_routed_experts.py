"""Reported experts equal the choices of training's forward pass, after any scheduling."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from models.documents import DocumentAttention
from models.step_context import MicrobatchContext
from serve.cache.routing_cache import RoutingCache
from serve.engine.core import EngineCore
from serve.engine.loading import Export, open_export
from serve.engine.request import Request, RequestError, SamplingParams
from tests.serve.drive import complete, greedy, make_request, run

MakeCore = Callable[..., EngineCore]


@pytest.fixture(scope="module")
def export(two_layers: Path) -> Export:
    return open_export(two_layers, device="cpu")


def expected(export: Export, request: Request) -> np.ndarray:
    """`[tokens - 1, L, K]`, by one pass over the whole sequence with training's attention."""
    tokens = torch.tensor(request.tokens[:-1])
    positions = torch.arange(len(tokens))
    context = MicrobatchContext.recording(export.model.config)
    with torch.no_grad():
        export.model(tokens, positions, DocumentAttention(positions[None]), context=context)
    ids = context.routed_experts()
    found: np.ndarray = ids.transpose(0, 1).numpy().astype(np.uint16)
    return found


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_through_chunks_prefix_hits_and_retraction(
    make_core: MakeCore, export: Export, overlap: str
) -> None:
    core = make_core(
        routed_experts=True, overlap=overlap, kv_tokens=140, page_size=4, max_batch_tokens=17
    )
    rng = random.Random(0)
    shared = [rng.randrange(1, 300) for _ in range(22)]
    params = greedy(16, return_routed_experts=True)
    prompts = [shared[: rng.choice([0, 12, 22])] + [rng.randrange(1, 300)] * 9 for _ in range(9)]
    requests = [make_request(core, prompt, params) for prompt in prompts]
    run(core, requests)
    core.close()
    assert core.scheduler.n_retracted and core.scheduler.n_cached_tokens
    for request in requests:
        assert request.routed_experts is not None
        assert request.routed_experts.dtype == np.uint16
        assert np.array_equal(request.routed_experts, expected(export, request))


def test_only_who_asks_and_only_if_started_for_it(make_core: MakeCore) -> None:
    core = make_core(routed_experts=True)
    (found,) = complete(core, [[5, 6, 7]], greedy(2))
    assert found.request is not None and found.request.routed_experts is None
    with pytest.raises(RequestError, match="not started with routed_experts"):
        make_request(make_core(), [1], SamplingParams(return_routed_experts=True))


def test_ids_beyond_a_signed_number() -> None:
    cache = RoutingCache(3, 2, 1, 2, torch.device("cpu"))
    cache.write(torch.tensor([2, 5]), torch.tensor([[[65535, 0], [40000, 7]]]))
    assert cache.read([1, 2], 4).tolist() == [[[65535, 0]], [[0, 0]], [[0, 0]], [[40000, 7]]]
