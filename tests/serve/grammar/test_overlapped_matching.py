"""What may follow is computed during the forward pass: late results change no output."""

import socket
from collections.abc import Callable
from typing import Any

import pytest

from serve.engine.core import EngineCore
from serve.engine.request import start_grammars
from serve.grammar import matcher
from tests.serve.drive import complete, make_request
from tests.serve.grammar.conftest import PERSON, Params


def run(core: EngineCore, params: Any) -> tuple[list[int], str | None, int]:
    """Tokens, reason and forward passes of one request."""
    request = make_request(core, "x", params)
    start_grammars([request])
    core.scheduler.add([request])
    n_steps = 0
    while core.busy:
        core.step()
        n_steps += 1
    return request.output, request.finish_reason, n_steps


def test_the_end_is_noticed_a_pass_late_only_once(core: EngineCore, params: Params) -> None:
    """Until the grammar knows after which tokens outputs are complete."""
    one = params(regex="[xy]{3}")
    first, second = run(core, one), run(core, one)
    assert first[:2] == second[:2] and first[1] == "stop" and len(first[0]) <= 3
    assert first[2] == len(first[0]) + 1 and second[2] == len(second[0])


def test_the_last_token_decides_on_the_reason(core: EngineCore, params: Params) -> None:
    """Complete with the last token that is allowed: not ended by the length."""
    tokens, reason, _ = run(core, params(regex="[vw]{4}", max_tokens=40))
    assert reason == "stop"
    exact = params(regex="[wv]{4}", max_tokens=len(tokens))
    assert run(core, exact)[1] == "stop"
    assert run(core, params(regex="[vw]{4}z", max_tokens=len(tokens)))[1] == "length"


def test_forced_text_is_found_late_and_then_in_time(core: EngineCore, params: Params) -> None:
    """A pass more for each run of forced tokens, until they are expected; the same output."""
    one = params(regex="([mn] the numbers and more numbers ){4}", seed=5)
    (first, _, slow), (second, _, fast) = run(core, one), run(core, one)
    assert first == second and fast < slow


@pytest.mark.parametrize("n_at_once", [1, 2, pytest.param(256, marks=pytest.mark.slow)])
def test_more_outputs_than_fit_in_a_message(
    n_at_once: int, core: EngineCore, plain_core: EngineCore, params: Params,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert core.grammars is not None
    core.grammars.matchers.close()  # the memory for masks has this size
    each = [params(json_schema=PERSON, seed=n, temperature=n % 2) for n in range(5)]
    expected = complete(plain_core, ["x"] * 5, each)
    monkeypatch.setattr(matcher, "MAX_ITEMS", n_at_once)
    found = complete(core, ["x"] * 5, each)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    core.grammars.matchers.close()


@pytest.mark.parametrize("when", ["before the pass", "during the pass"])
def test_the_process_is_lost(
    when: str, core: EngineCore, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every few steps; requests continue with the same output."""
    each = [params(regex="[ab]{9} (c|d){9}", seed=n) for n in range(3)]
    expected = complete(core, ["x"] * 3, each)
    requests = [make_request(core, "x", one) for one in each]
    start_grammars(requests)
    core.scheduler.add(requests)
    assert core.grammars is not None
    matchers = core.grammars.matchers
    calls = [0]

    def losing(call: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*arguments: Any) -> None:
            calls[0] += 1
            if calls[0] % 5 == 0 and matchers._connection is not None:
                matchers._connection.shutdown(socket.SHUT_RDWR)
            call(*arguments)

        return wrapped

    name = "begin" if when == "before the pass" else "finish"
    monkeypatch.setattr(matchers, name, losing(getattr(matchers, name)))
    while core.busy:
        core.step()
    assert calls[0] >= 10
    assert [request.output for request in requests] == [one.tokens for one in expected]


def test_a_failed_pass_leaves_no_answer_behind(
    core: EngineCore, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requests end with an error; the next ones get their own masks."""
    expected = complete(core, ["x"], params(regex="[cd]{12}"))
    request = make_request(core, "x", params(regex="[ab]{12}"))
    start_grammars([request])
    core.scheduler.add([request])
    core.step()
    with monkeypatch.context() as patch:

        def fail(*arguments: Any) -> None:
            raise RuntimeError("the device is lost")

        patch.setattr(core.executor.runner, "run", fail)
        core.step()
    assert request.finish_reason == "error"
    again = complete(core, ["x"], params(regex="[cd]{12}"))
    assert [one.tokens for one in again] == [one.tokens for one in expected]
