"""Bad, recursive and hostile grammars are refused, or end their own request; the server goes on."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export
from serve.engine.request import start_grammars
from serve.grammar.limits import COMPILE_SECONDS, N_COMPILING, PROBE_TOKENS
from tests.serve.conftest import RunningServer, run_server
from tests.serve.drive import complete, make_request
from tests.serve.grammar.conftest import Params


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def chain(n: int) -> dict[str, Any]:
    """A reference through n definitions."""
    parts = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(n)}
    return {"$ref": "#/$defs/d0", "$defs": parts | {f"d{n}": {"type": "null"}}}


HOSTILE: dict[str, dict[str, Any]] = {
    "nested objects": {"json_schema": nested(70)},
    "nested text": {"json_schema": '{"a":' * 10000 + "1" + "}" * 10000},
    "large enum": {"json_schema": {"enum": [f"value {i}" for i in range(100_000)]}},
    "endless reference": {"json_schema": {"$ref": "#"}},
    "circle of references": {"json_schema": {"$ref": "#/$defs/a", "$defs": {
        "a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}},
    "required recursion": {"json_schema": {"type": "object", "properties": {
        "a": {"$ref": "#"}}, "required": ["a"]}},
    "unknown reference": {"json_schema": {"$ref": "https://example.org/schema"}},
    "contradiction": {"json_schema": {"type": "integer", "minimum": 2, "maximum": 1}},
    "not enforced": {"json_schema": {"type": "string", "not": {"const": "a"}}},
    "allOf of several": {"json_schema": {"allOf": [{"type": "string"}, {"minLength": 2}]}},
    "unknown type": {"json_schema": '{"type": "foo"}'},
    "no schema": {"json_schema": "no json"},
    "half a character": {"json_schema": '{"const": "\\ud800"}'},
    "huge count": {"regex": "a{1000000}"},
    "counts of counts": {"regex": "((a{1,100}){1,100}){1,100}b"},
    "nested groups": {"regex": "(" * 100_000 + ")" * 100_000},
    "open group": {"regex": "(a"},
    "look-ahead": {"regex": "a(?=b)c"},
    "left recursion": {"ebnf": 'root ::= root "a" | root'},
    "endless text": {"ebnf": 'root ::= "a" root'},
    "unknown rule": {"ebnf": "root ::= other"},
    "null character": {"ebnf": 'root ::= "\0"'},
    "two grammars": {"regex": "a", "ebnf": 'root ::= "a"'},
    "no choice": {"guided_choice": []},
    "many choices": {"guided_choice": [str(i) for i in range(5000)]},
    "unknown tag": {"structural_tag": {"type": "structural_tag", "format": {"type": "bogus"}}},
}  # fmt: skip

LATER = PROBE_TOKENS + 8
ENDLESS_LATER = f'root ::= [a-c]{{{LATER}}} end\nend ::= "a" end'
"""Harmless for the tokens that a compiled grammar is tried with."""


@pytest.fixture(scope="module")
def server(export: Export) -> Iterator[RunningServer]:
    with run_server(EngineCore(export, EngineOptions(kv_tokens=8192, max_running=8))) as running:
        body = {"prompt": "x", "max_tokens": 1, "regex": "a"}  # starts the worker
        assert httpx.post(f"{running.url}/v1/completions", json=body, timeout=60).status_code == 200
        yield running


class Stream(threading.Thread):
    """One long stream after another; `gaps` are the times between their events."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.gaps: list[float] = []
        self.ends = threading.Event()

    def run(self) -> None:
        body = {"prompt": "x", "max_tokens": 180, "ignore_eos": True, "stream": True}
        while not self.ends.is_set():
            with httpx.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
                last = time.monotonic()
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        assert "choices" in json.loads(line[6:])
                        now = time.monotonic()
                        self.gaps.append(now - last)
                        last = now


@pytest.mark.long
@pytest.mark.parametrize(
    "names",
    [
        ["nested objects", "endless reference", "huge count", "left recursion", "unknown tag"],
        pytest.param(list(HOSTILE), marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_each_gets_400_while_a_stream_continues(names: list[str], server: RunningServer) -> None:
    stream = Stream(server.url)
    stream.start()
    slowest = 0.0
    try:
        for name in names:
            begin = time.monotonic()
            body = {"prompt": "x", "max_tokens": 20} | HOSTILE[name]
            url = f"{server.url}/v1/completions"
            answer = httpx.post(url, content=json.dumps(body), timeout=60)
            assert answer.status_code == 400, (name, answer.text[:300])
            error = answer.json()["error"]
            assert error["message"] and "\n" not in error["message"], name
            slowest = max(slowest, time.monotonic() - begin)
    finally:
        stream.ends.set()
        stream.join()
    # limits are of processor time; a busy machine takes longer
    assert slowest < 10 * COMPILE_SECONDS
    assert len(stream.gaps) > 10 and max(stream.gaps) < 10
    answer = httpx.post(url, json={"prompt": "x", "regex": "ok"}, timeout=60)
    assert answer.json()["choices"][0]["text"] == "ok"


@pytest.mark.long
@pytest.mark.parametrize("n_hostile", [1, pytest.param(N_COMPILING - 1, marks=pytest.mark.slow)])
def test_a_cached_grammar_waits_for_no_other(n_hostile: int, server: RunningServer) -> None:
    """Neither does a new one while there are fewer hostile ones than compilations at a time."""
    hostile = [
        {"prompt": "x", "json_schema": chain(4000 + 10 * n_hostile + i)} for i in range(n_hostile)
    ]
    url, codes = f"{server.url}/v1/completions", []

    def post(body: dict[str, Any]) -> None:
        codes.append(httpx.post(url, json=body, timeout=60).status_code)

    threads = [threading.Thread(target=post, args=(body,)) for body in hostile]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    for regex in ("a", "new"):
        answer = httpx.post(url, json={"prompt": "x", "regex": regex}, timeout=60)
        assert answer.json()["choices"][0]["text"] == regex and not codes
    for thread in threads:
        thread.join()
    assert codes == [400] * n_hostile


def test_refusals_are_cached(server: RunningServer) -> None:
    body = {"prompt": "x", "ebnf": 'root ::= "again" root'}
    url, times = f"{server.url}/v1/completions", []
    for _ in range(2):
        begin = time.monotonic()
        assert httpx.post(url, json=body, timeout=60).status_code == 400
        times.append(time.monotonic() - begin)
    assert times[1] < times[0] / 3


@pytest.mark.parametrize("with_worker", [False, True])
def test_a_lost_process_is_replaced(with_worker: bool, core: EngineCore, params: Params) -> None:
    """Requests continue with the same output; also if the process that starts others is lost."""
    each = [params(regex="[ab]{9} (c|d){9}", seed=n) for n in range(3)]
    expected = complete(core, ["x"] * 3, each)
    requests = [make_request(core, "x", one) for one in each]
    start_grammars(requests)
    core.scheduler.add(requests)
    for _ in range(5):
        core.step()
    assert core.grammars is not None
    connection = core.grammars.matchers._connection
    assert connection is not None
    worker = core.grammars.worker._process
    assert worker is not None
    if with_worker:
        worker.kill()
        worker.wait()
    connection.shutdown(socket.SHUT_RDWR)
    while core.busy:
        core.step()
    assert [request.output for request in requests] == [one.tokens for one in expected]
    assert (core.grammars.worker._process is worker) == (not with_worker)
    assert complete(core, ["x"], params(regex="new"))[0].text == "new"


@pytest.mark.long
def test_a_request_that_matches_too_long_ends_alone(core: EngineCore, params: Params) -> None:
    """The others of its batch continue with the same output."""
    each = [params(regex=f"[ab]{{{LATER + 10}}}", seed=n) for n in range(2)]
    expected = complete(core, ["x"] * 2, each)
    found = complete(core, ["x"] * 3, [each[0], params(ebnf=ENDLESS_LATER), each[1]])
    assert [one.finish_reason for one in found] == ["stop", "error", "stop"]
    assert len(found[1].text) in (LATER - 1, LATER)
    assert [found[0].tokens, found[2].tokens] == [one.tokens for one in expected]
