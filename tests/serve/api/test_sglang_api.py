"""SGLang's native routes. References: full forward passes, and the completions API."""

import base64
import itertools
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tokenizers import Tokenizer

from serve.api import sglang_generate
from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export, open_export
from tests.serve.conftest import RunningServer, run_server

Greedy = Callable[[Sequence[int], int], list[int]]
PARAMS = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def routed(export: Export) -> Iterator[RunningServer]:
    options = EngineOptions(kv_tokens=4096, routed_experts=True)
    with run_server(EngineCore(export, options)) as running:
        yield running


@pytest.fixture
def http(routed: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=routed.url, timeout=120) as client:
        yield client


def generate(http: httpx.Client, **body: Any) -> Any:
    answer = http.post("/generate", json={"sampling_params": PARAMS} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_text_and_ids(http: httpx.Client, tokenizer: Tokenizer, greedy_reference: Greedy) -> None:
    ids = tokenizer.encode("def add").ids
    expected = greedy_reference(ids, 8)
    for one in (generate(http, text="def add"), generate(http, input_ids=ids)):
        assert one["output_ids"] == expected
        assert one["text"] == tokenizer.decode(expected)
        meta = one["meta_info"]
        assert meta["finish_reason"] == {"type": "length", "length": 8}
        assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(ids), 8)


def test_lists_and_choices(http: httpx.Client, greedy_reference: Greedy) -> None:
    prompts = [[5, 6], [7, 8, 9]]
    params = [PARAMS, PARAMS | {"max_new_tokens": 3, "n": 2}]
    found = generate(http, input_ids=prompts, sampling_params=params, rid=["a", "b"])
    expected = [greedy_reference(prompts[0], 8), *[greedy_reference(prompts[1], 3)] * 2]
    assert [one["output_ids"] for one in found] == expected
    assert [one["meta_info"]["id"] for one in found] == ["a", "b", "b"]
    assert isinstance(generate(http, input_ids=[[5, 6]]), list)


def test_streams_are_cumulative(http: httpx.Client) -> None:
    whole = generate(http, text="a", return_logprob=True, top_logprobs_num=2)
    body = {"text": "a", "sampling_params": PARAMS, "stream": True, "return_logprob": True}
    lines = http.post("/generate", json=body).text.split("\n\n")
    events = [json.loads(line[6:]) for line in lines[:-2]]
    assert lines[-2:] == ["data: [DONE]", ""]
    assert events[-1]["text"] == whole["text"]
    assert [len(event["output_ids"]) for event in events] == list(range(1, 9))
    assert all(
        later["text"].startswith(first["text"]) for first, later in itertools.pairwise(events)
    )
    assert [event["meta_info"]["finish_reason"] is None for event in events] == [True] * 7 + [False]
    mine = events[-1]["meta_info"]["output_token_logprobs"]
    assert [one[:2] for one in mine] == [
        pytest.approx(one[:2], abs=1e-4) for one in whole["meta_info"]["output_token_logprobs"]
    ]


def test_long_streams_repeat_themselves_less_often(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every event has everything, so one per token would cost the square of an output's length."""
    monkeypatch.setattr(sglang_generate, "_LARGE", 400)
    params = PARAMS | {"max_new_tokens": 100}
    body: dict[str, Any] = {"input_ids": [5, 6], "sampling_params": params, "return_logprob": True}
    body |= {"logprob_start_len": 0, "top_logprobs_num": 1, "return_text_in_logprobs": True}
    whole = generate(http, **body)
    lines = http.post("/generate", json=body | {"stream": True}).text.split("\n\n")
    events = [json.loads(line[6:]) for line in lines[:-2]]
    sizes = [len(event["output_ids"]) for event in events]
    assert sizes[:20] == list(range(1, 21)) and sizes[-1] == 100 and len(sizes) < 70
    assert all(16 * (b - a) < b + 16 for a, b in itertools.pairwise(sizes))
    last = events[-1]["meta_info"]
    for name, value in whole["meta_info"].items():
        assert name in ("id", "cached_tokens", "e2e_latency") or last[name] == value or (
            name.endswith("logprobs") and len(last[name]) == len(value)
        ), name  # fmt: skip
    assert events[-1]["text"] == whole["text"]


def test_logprobs_equal_those_of_completions(http: httpx.Client) -> None:
    prompt = [5, 17, 99]
    meta = generate(
        http, input_ids=prompt, return_logprob=True, logprob_start_len=0, top_logprobs_num=2
    )["meta_info"]
    body = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 8, "temperature": 0}
    choice = http.post("/v1/completions", json=body | {"ignore_eos": True}).json()["choices"][0]
    listed = meta["input_token_logprobs"] + meta["output_token_logprobs"]
    assert [one[1] for one in listed[:3]] == prompt
    assert listed[0][0] is None
    expected = choice["logprobs"]["token_logprobs"]
    assert [one[0] for one in listed[1:]] == pytest.approx(expected[1:], abs=1e-4)
    assert len(meta["output_top_logprobs"]) == 8 and len(meta["input_top_logprobs"]) == 3
    late = generate(
        http, input_ids=prompt, return_logprob=True, logprob_start_len=3, top_logprobs_num=2
    )["meta_info"]
    assert (late["input_token_logprobs"], late["input_top_logprobs"]) == ([], [])


def test_routed_experts(two_layers: Path) -> None:
    options = EngineOptions(kv_tokens=512, routed_experts=True)
    core = EngineCore(open_export(two_layers, device="cpu"), options)
    with run_server(core) as server, httpx.Client(base_url=server.url, timeout=120) as http:
        meta = generate(http, input_ids=[5, 6, 7], return_routed_experts=True)["meta_info"]
    data = np.frombuffer(base64.b64decode(meta["routed_experts"]), "<i4")
    shape = meta["routed_experts_shape"]
    assert shape == [10, 2, 2] and data.size == np.prod(shape)
    assert data.min() >= 0 and data.max() < 4


def test_what_ended_it(http: httpx.Client) -> None:
    text = generate(http, text="a")["text"]
    stopped = generate(http, text="a", sampling_params=PARAMS | {"stop": [text[3:5]]})
    assert stopped["text"] == text[: text.find(text[3:5])]
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": text[3:5]}
    first = generate(http, text="a")["output_ids"][0]
    ended = generate(http, text="a", sampling_params=PARAMS | {"stop_token_ids": [first]})
    assert ended["meta_info"]["finish_reason"] == {"type": "stop", "matched": first}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": "a", "input_ids": [1]},
        {"text": [5]},
        {"input_ids": "a"},
        {"input_ids": []},
        {"text": "a", "sampling_params": 5},
        {"text": "a", "sampling_params": {"max_new_token": 5}},
        {"text": "a", "sampling_params": {"stop_regex": "a"}},
        {"text": "a", "sampling_params": [{}, {}]},
        {"text": ["a", "b"], "rid": ["x", "x"]},
        {"text": ["a", "b"], "rid": ["x"]},
        {"text": "a", "rid": 5},
        {"text": "a", "priority": 1.5},
        {"text": "a", "top_logprobs_num": 21},
        {"text": "a", "return_hidden_states": True},
        {"text": "a", "echo": True},
        {"text": "a", "logprobs": 5},
    ],
)
def test_bad_bodies(http: httpx.Client, body: dict[str, Any]) -> None:
    answer = http.post("/generate", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_aborts_and_equal_names(small_server: RunningServer) -> None:
    step = small_server.core.step

    def slow() -> Any:
        time.sleep(0.03)
        return step()

    small_server.core.step = slow  # type: ignore[method-assign]
    body = {"text": "a", "sampling_params": PARAMS | {"max_new_tokens": 150}, "rid": "mine"}
    found: list[Any] = []
    with httpx.Client(base_url=small_server.url, timeout=30) as http:
        thread = threading.Thread(
            target=lambda: found.append(httpx.post(f"{small_server.url}/generate", json=body))
        )
        thread.start()
        while not small_server.core.scheduler.running:
            time.sleep(0.01)
        again = http.post("/v1/completions", json={"prompt": "a", "rid": "mine"})
        assert (again.status_code, again.json()["error"]["code"]) == (400, "duplicate_rid")
        assert http.post("/abort_request", json={"rid": "other"}).json()["aborted"] == 0
        assert http.post("/abort_request", json={"rid": "mine"}).json()["aborted"] == 1
        thread.join(5)
        assert found[0].json()["meta_info"]["finish_reason"]["type"] == "abort"
        small_server.wait_until_idle()
        assert http.post("/abort_request", json={}).status_code == 400
        assert http.post("/generate", json=body | {"sampling_params": PARAMS}).status_code == 200


def test_information(http: httpx.Client, routed: RunningServer, export_folder: Path) -> None:
    config = json.loads((export_folder / "config.json").read_text())
    names = (config["model_type"], config["architectures"])
    for path in ("/model_info", "/get_model_info"):
        info = http.get(path).json()
        assert info["served_model_name"] == "tiny"
        assert (info["model_type"], info["architectures"]) == names
    for path in ("/server_info", "/get_server_info"):
        info = http.get(path).json()
        assert (info["tp_size"], info["dp_size"], info["disaggregation_mode"]) == (1, 1, "null")
        assert (info["model_type"], info["architectures"]) == names
        assert info["max_total_num_tokens"] == routed.core.cache.capacity
    assert http.get("/get_load").json() == [
        {"dp_rank": 0, "num_reqs": 0, "num_waiting_reqs": 0, "num_tokens": 0}
    ]
    assert http.get("/v1/loads").json()["loads"][0]["num_running_reqs"] == 0
    assert http.get("/health_generate").status_code == 200


def test_flush_cache(http: httpx.Client) -> None:
    body = {"input_ids": list(range(1, 41))}
    cached = []
    for flush in (True, False, True):
        if flush:
            assert http.post("/flush_cache").json()["success"]
        cached.append(generate(http, **body)["meta_info"]["cached_tokens"])
    assert cached == [0, 32, 0]


def test_tokenize_and_detokenize(http: httpx.Client, tokenizer: Tokenizer) -> None:
    text = "def é 🙂"
    found = http.post("/tokenize", json={"prompt": text}).json()
    ids = tokenizer.encode(text).ids
    assert (found["tokens"], found["count"], found["max_model_len"]) == (ids, len(ids), 192)
    assert http.post("/tokenize", json={"prompt": [text, ""]}).json()["tokens"] == [ids, [0]]
    assert http.post("/detokenize", json={"tokens": ids}).json()["text"] == text
    both = http.post("/detokenize", json={"tokens": [ids, [0]], "skip_special_tokens": False})
    assert both.json()["text"] == ["<|endoftext|>" + text, "<|endoftext|>"]
    for path, body in [
        ("/tokenize", {}), ("/tokenize", {"prompt": 5}), ("/tokenize", {"prompt": "a" * 10**6}),
        ("/detokenize", {"tokens": "a"}), ("/detokenize", {"tokens": [10**12]}),
        ("/detokenize", {"tokens": [[1], 2]}), ("/detokenize", {"tokens": [-1]}),
    ]:  # fmt: skip
        assert http.post(path, json=body).status_code == 400, (path, body)


def test_update_weights(export_folder: Path, export: Export, tmp_path: Path) -> None:
    same, broken = tmp_path / "same", tmp_path / "broken"
    shutil.copytree(export_folder, same)
    shutil.copytree(export_folder, broken)
    for weights in broken.glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:1000])
    (same / "tokenizer.json").unlink()  # it is not read
    longer, empty = tmp_path / "longer", tmp_path / "empty"
    shutil.copytree(export_folder, longer)
    config = json.loads((longer / "config.json").read_text())
    (longer / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 999}))
    empty.mkdir()
    shutil.copy(export_folder / "config.json", empty)
    with run_server(EngineCore(export, EngineOptions(kv_tokens=4096))) as server:
        with httpx.Client(base_url=server.url, timeout=30) as http:
            before = generate(http, text="a")["text"]
            for folder in (broken, tmp_path / "nowhere", Path("x\x00y"), longer, empty):
                refused = http.post("/update_weights_from_disk", json={"model_path": str(folder)})
                assert refused.status_code == 400, folder
                assert generate(http, text="a")["text"] == before
            done = http.post("/update_weights_from_disk", json={"model_path": str(same)})
            assert done.json()["success"]
            assert http.get("/model_info").json()["model_path"] == str(same)
            again = generate(http, text="a")
            assert again["text"] == before and again["meta_info"]["cached_tokens"] == 0


def test_an_update_that_fails_late_changes_nothing(
    export_folder: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = EngineCore(export, EngineOptions(kv_tokens=1024))

    def fail(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("serve.engine.core.make_runner", fail)
        core.update_weights(export_folder)
    assert core.export is export
    core.close()
