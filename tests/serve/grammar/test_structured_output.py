"""Structured output is valid, and ends where it should."""

import json
import random
import re
from typing import Any

import jsonschema
import pytest

from serve.engine.core import EngineCore
from serve.engine.request import RequestError, start_grammars
from tests.serve.drive import complete, make_request, run
from tests.serve.grammar.conftest import PERSON, Params
from tests.serve.grammar.schemas import make_schema


@pytest.mark.long
@pytest.mark.parametrize("n_schemas", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_generated_schemas(n_schemas: int, core: EngineCore, params: Params) -> None:
    """Outputs that end by themselves are valid, whatever a random model would like to write."""
    rng = random.Random(0)
    schemas = [make_schema(rng) for _ in range(n_schemas)]
    each = [
        params(json_schema=schema, seed=n, temperature=0 if n % 4 == 0 else 1)
        for n, schema in enumerate(schemas)
    ]
    found = []
    for first in range(0, len(each), 50):  # a burst of more would be refused
        some = each[first : first + 50]
        found += complete(core, ["x"] * len(some), some)
    checked = 0
    for schema, one in zip(schemas, found, strict=True):
        if one.finish_reason == "length":
            continue
        assert one.finish_reason == "stop"
        jsonschema.Draft202012Validator(schema).validate(json.loads(one.text))
        checked += 1
    assert checked >= n_schemas * 3 // 4


@pytest.mark.parametrize(
    ("more", "pattern"),
    [
        ({"regex": "[a-c]{3}"}, "[a-c]{3}"),
        ({"regex": "[a-c]{3}", "min_tokens": 100}, "[a-c]{3}"),
        ({"regex": "[a-c]{3}", "ignore_eos": True}, "[a-c]{3}"),
        ({"regex": "[a-c]{3}", "n": 1, "top_k": 1, "logprobs": 2}, "[a-c]{3}"),
        ({"choices": ("red", "blé 🙂")}, "red|blé 🙂"),
        ({"choices": ("same",)}, "same"),
        ({"ebnf": 'root ::= "yes " ("a" | "b") "!"'}, "yes (a|b)!"),
        ({"regex": "aa(b|c)dd", "stop": ("d",)}, "aa(b|c)"),
        ({"regex": "a", "max_tokens": 1}, "a"),
        ({"regex": "(x|y)<.endoftext.>z"}, "(x|y)<.endoftext.>z"),
        ({"json_schema": "false", "max_tokens": 1}, None),
        ({"json_schema": {"type": "object"}, "max_tokens": 100}, r"\{.*"),
        (
            {"structural_tag": {"type": "structural_tag", "format": {
                "type": "tag", "begin": "<a>", "end": "</a>",
                "content": {"type": "json_schema", "json_schema": PERSON}}}},
            r'<a>\{"name": "[^\n]*", "number of legs": \d, "quick brown fox": "[a-z ]+"\}</a>',
        ),
        (
            {"structural_tag": {"type": "structural_tag", "triggers": ["<f"], "structures": [
                {"begin": "<f>", "schema": {"type": "boolean"}, "end": "</f>"}]},
             "max_tokens": 60},
            r"(?s)((?!<f).|<f>(true|false)</f>)*(<f|<f>.*)?",
        ),
    ],
)  # fmt: skip
def test_kinds_and_ends(
    core: EngineCore, params: Params, more: dict[str, Any], pattern: str | None
) -> None:
    if pattern is None:
        with pytest.raises(RequestError):
            complete(core, ["x"], params(**more))
        return
    (one,) = complete(core, ["x"], params(**more))
    assert re.fullmatch(pattern, one.text), one
    assert one.finish_reason == ("stop" if more.get("max_tokens", 1) == 1 else one.finish_reason)
    if more.get("max_tokens") is None:
        assert one.finish_reason == "stop"


def test_an_open_end_runs_to_the_limit(core: EngineCore, params: Params) -> None:
    (one,) = complete(core, ["x"], params(regex="a+", ignore_eos=True, max_tokens=20))
    assert one.finish_reason == "length" and len(one.tokens) == 20 and set(one.text) == {"a"}


def test_a_stop_token_of_the_client_that_the_grammar_needs(
    core: EngineCore, params: Params
) -> None:
    (token,) = core.encode("a", False)
    more = {"regex": "a", "stop_token_ids": (token,), "min_tokens": 9}
    (one,) = complete(core, ["x"], params(**more))
    assert (one.tokens, one.finish_reason) == ([token], "stop")


def test_mixed_batch_leaves_others_alone(core: EngineCore, params: Params) -> None:
    """A request without a grammar has the same output next to ones that have one."""
    (alone,) = complete(core, ["hello"], params(max_tokens=30))
    each = [params(json_schema=PERSON), params(max_tokens=30), params(regex="[xyz]{9}")]
    found = complete(core, ["x", "hello", "x"], each)
    assert found[1].tokens == alone.tokens
    assert json.loads(found[0].text) and re.fullmatch("[xyz]{9}", found[2].text)


def test_choices_of_a_call_and_cached_prefixes(core: EngineCore, params: Params) -> None:
    prompt = core.encode("The quick brown fox jumps over the lazy dog, numbers and more numbers")
    requests = core.make_requests(prompt, params(json_schema=PERSON, n=4, seed=5))
    found = run(core, requests)
    assert len({one.text for one in found}) > 1
    for index, one in enumerate(found):
        jsonschema.validate(json.loads(one.text), PERSON)
        (alone,) = complete(core, [prompt], params(json_schema=PERSON, seed=5 + index))
        assert alone.tokens == one.tokens
        assert alone.request is not None and alone.request.num_cached


def test_aborted_requests_leave_nothing(core: EngineCore, params: Params) -> None:
    requests = [make_request(core, "x", params(json_schema=PERSON, seed=n)) for n in range(3)]
    start_grammars(requests)
    core.scheduler.add(requests)
    for _ in range(3):
        core.step()
    for request in requests[1:]:
        core.scheduler.finish(request, "cancelled")
    while core.busy:
        core.step()
    jsonschema.validate(json.loads(core.inputs.text_encoder.decode(requests[0].output)), PERSON)
