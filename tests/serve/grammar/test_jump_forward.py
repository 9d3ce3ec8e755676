"""Jump-forward gives the tokens that sampling them one by one gives, with fewer forward passes."""

from typing import Any

import numpy as np
import pytest

from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export
from serve.engine.request import SamplingParams, start_grammars
from tests.serve.drive import complete, make_request
from tests.serve.grammar.conftest import PERSON, Params


@pytest.mark.long
def test_same_tokens_with_and_without(
    core: EngineCore, plain_core: EngineCore, params: Params
) -> None:
    each = [params(json_schema=PERSON, seed=n, temperature=n % 3 / 2) for n in range(9)]
    each += [params(regex="(abc|abd)+ the numbers", seed=n) for n in range(4)]
    each += [params(json_schema=PERSON, seed=50, repetition_penalty=1.3, frequency_penalty=0.5)]
    before = core.n_jumped
    jumped, expected = (complete(one, ["x"] * len(each), each) for one in (core, plain_core))
    assert [one.tokens for one in jumped] == [one.tokens for one in expected]
    assert [one.text for one in jumped] == [one.text for one in expected]
    assert core.n_jumped - before > 80 and plain_core.n_jumped == 0
    assert plain_core.scheduler.n_retracted


def test_forward_passes_saved_are_counted(
    core: EngineCore, plain_core: EngineCore, params: Params
) -> None:
    """Of a single request: a pass per token, without those that were jumped over."""
    one = params(json_schema=PERSON, seed=3)
    before, request = core.n_jumped, make_request(core, "x", one)
    start_grammars([request])
    core.scheduler.add([request])
    n_steps = 0
    while core.busy:
        core.step()
        n_steps += 1
    (plain,) = complete(plain_core, ["x"], one)
    saved = core.n_jumped - before
    assert request.output == plain.tokens
    assert saved > 10 and n_steps == len(plain.tokens) - saved


def test_scores_and_experts_are_of_every_token(export: Export, params: Params) -> None:
    """They are those of the same output without jumps."""
    core = EngineCore(export, EngineOptions(kv_tokens=4096, routed_experts=True))
    try:
        schema: dict[str, Any] = {"json_schema": PERSON, "temperature": 0}
        (plain,) = complete(core, ["x"], params(**schema))
        assert core.n_jumped > 10
        (scored,) = complete(core, ["x"], params(**schema, logprobs=1))
        (routed,) = complete(core, ["x"], params(**schema, return_routed_experts=True))
        assert plain.tokens == scored.tokens == routed.tokens
        assert [one.token for one in scored.logprobs] == scored.tokens
        assert routed.request is not None and routed.request.routed_experts is not None
        n_tokens = len(routed.request.tokens) - 1
        assert len(routed.request.routed_experts) == n_tokens
        (again,) = complete(
            core, [routed.request.tokens[:-1]],
            SamplingParams(max_tokens=1, return_routed_experts=True, temperature=0),
        )  # fmt: skip
        assert again.request is not None and again.request.routed_experts is not None
        assert np.array_equal(
            again.request.routed_experts[:n_tokens], routed.request.routed_experts
        )
    finally:
        core.close()
