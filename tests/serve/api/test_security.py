"""A test for each class of vulnerability that other inference servers had, named by its CVE.

The address that the server listens on (CVE-2025-30202) is in tests/serve/test_command.py, headers
of 17 KB (CVE-2025-48956) in test_mutations.py and tests/serve/test_api.py, templates
(CVE-2026-5760) in tests/serve/frontend/test_templates.py.
"""

import hmac
import itertools
import json
import random
import re
import shutil
import socket
import struct
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from starlette.routing import Route
from tokenizers import Tokenizer

from configs.errors import UserError
from serve.api import sglang_control
from serve.api.app import build_app
from serve.engine.core import EngineCore, EngineOptions
from serve.engine.loading import Export, open_export
from serve.frontend.thread import EngineThread
from tests.faults.pickles import pickles
from tests.serve.conftest import RunningServer, run_server

ROOT = Path(__file__).resolve().parents[3]
CHAT = "/v1/chat/completions"
Fields = dict[str, Any]


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Written by code that must not run."""
    return tmp_path / "executed"


def test_pickles_are_never_loaded_from_a_socket(
    server: RunningServer, http: httpx.Client, marker: Path
) -> None:
    """CVE-2024-50050, CVE-2026-3059, CVE-2026-3060, CVE-2025-10164."""
    for data in pickles(marker).values():
        _send_pickle(server, http, data)
    assert not marker.exists()


def _send_pickle(server: RunningServer, http: httpx.Client, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:
        raw.sendall(data)
        raw.shutdown(socket.SHUT_WR)
        while raw.recv(65536):
            pass
    paths = ["/v1/completions", CHAT, "/generate", "/tokenize", "/detokenize", "/abort_request"]
    for path in [*paths, "/update_weights_from_disk", "/update_weights_from_tensor"]:
        for kind in ("application/octet-stream", "application/x-pickle", "application/json"):
            answer = http.post(path, content=data, headers={"content-type": kind})
            assert answer.status_code in (400, 404)


def test_tensors_of_clients_are_refused(http: httpx.Client) -> None:
    """CVE-2025-62164."""
    for name in ("prompt_embeds", "input_embeds", "image_data", "audio_data"):
        for path, body in (
            ("/v1/completions", {"prompt": "a"}), ("/generate", {"text": "a"}),
            (CHAT, {"messages": [{"role": "user", "content": "a"}]}),
        ):  # fmt: skip
            answer = http.post(path, json=body | {name: "gAN9cQAu"})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


def test_weights_in_pickles_are_not_opened(
    export_folder: Path, tmp_path: Path, marker: Path
) -> None:
    """CVE-2025-32434, CVE-2026-24747: under the name of a pickle, or of safetensors."""
    for name, raw in itertools.product(
        ("pytorch_model.bin", "model.safetensors"), pickles(marker).values()
    ):
        folder = tmp_path / f"{raw[0]}-{name}"
        shutil.copytree(export_folder, folder)
        for weights in folder.glob("*.safetensors*"):
            weights.unlink()
        (folder / name).write_bytes(raw)
        with pytest.raises(UserError):
            open_export(folder, device="cpu")
    assert not marker.exists()


def test_the_torch_of_those_faults_is_excluded() -> None:
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (torch_needs,) = (line for line in needs if re.match(r"torch\b(?!titan)", line))
    lowest = re.search(r">=(\d+)\.(\d+)", torch_needs)
    assert lowest is not None and (int(lowest[1]), int(lowest[2])) >= (2, 10)
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


def test_code_in_an_export_is_not_imported(
    export_folder: Path, tmp_path: Path, marker: Path
) -> None:
    """CVE-2026-22807."""
    folder = tmp_path / "poisoned"
    shutil.copytree(export_folder, folder)
    code = f"open({str(marker)!r}, 'w')\nclass Model: pass\n"
    for name in (
        "modeling_evil.py",
        "tokenization_evil.py",
        "__init__.py",
        "configuration_evil.py",
    ):
        (folder / name).write_text(code)
    place = folder / "config.json"
    evil = {
        "AutoConfig": "configuration_evil.Config",
        "AutoModelForCausalLM": "modeling_evil.Model",
    }
    place.write_text(json.dumps(json.loads(place.read_text()) | {"auto_map": evil}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_evil.Model", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    try:
        open_export(folder, device="cpu")
    except UserError as error:
        assert "auto_map" in str(error)
    assert not marker.exists()


def test_variables_of_templates_are_values_only(http: httpx.Client) -> None:
    """CVE-2025-62426: no option of the renderer or tokenizer, and nothing that is reserved."""
    body: Fields = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    for name in ("messages", "tools", "add_generation_prompt", "documents"):
        answer = http.post(CHAT, json=body | {"chat_template_kwargs": {name: "x"}})
        assert answer.status_code == 400
    plain = http.post(CHAT, json=body).json()["usage"]["prompt_tokens"]
    for variables in ({"chat_template": "{{ 1 }}"}, {"tokenize": False, "bos_token": "x" * 99}):
        answer = http.post(CHAT, json=body | {"chat_template_kwargs": variables})
        assert answer.json()["usage"]["prompt_tokens"] == plain


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 129), ("n", 10**18), ("best_of", 10**18), ("logprobs", 21), ("logprobs", 10**18),
        ("max_tokens", 10**18), ("min_tokens", 10**18), ("stop", ["x"] * 65), ("stop", ["x" * 257]),
        ("stop_token_ids", [1] * 65), ("logit_bias", {str(i): 0 for i in range(1025)}),
        ("prompt", ["a"] * 129), ("top_k", 10**18), ("beam_width", 10**18), ("priority", 10**18),
    ],
)  # fmt: skip
def test_numbers_are_bounded_before_allocation(http: httpx.Client, name: str, value: Any) -> None:
    """CVE-2026-34756."""
    answer = http.post("/v1/completions", json={"prompt": "a", name: value})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == name


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", "function": {"name": "f", "parameters": {"pattern": "("}}},
        {"type": "function", "function": {"name": "f", "parameters": {"type": "strange"}}},
        {"type": "function", "function": {"name": "f", "parameters": {"pattern": "(", "not": {}}}},
        {"type": ["function"]}, "function", None, {"function": 5},
    ],
)  # fmt: skip
def test_malformed_tools_are_an_error_of_the_client(http: httpx.Client, tool: Any) -> None:
    """CVE-2025-48944."""
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "tools": [tool]}
    assert http.post(CHAT, json=body).status_code == 400
    assert http.get("/health_generate").status_code == 200


def test_malformed_grammars_between_good_requests(http: httpx.Client) -> None:
    """A malformed grammar after a valid request ended an engine; and floods of grammars."""
    deep = {"type": "array"}
    for _ in range(300):
        deep = {"type": "array", "items": deep}  # type: ignore[dict-item]
    bad: list[Fields] = [
        {"regex": "("}, {"regex": "(a+)+$" * 300}, {"ebnf": "root ::= root"}, {"ebnf": "\x00"},
        {"json_schema": "{"}, {"json_schema": json.dumps(deep)},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
        {"response_format": {"type": "strange"}}, {"structural_tag": "x"}, {"guided_json": 5},
    ]  # fmt: skip
    for fields in bad:
        answer = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1} | fields)
        assert answer.status_code == 400, fields
        assert (
            http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
        )


@pytest.mark.parametrize("n_names", [5, pytest.param(2, marks=pytest.mark.slow)])
def test_all_pairs_of_sampling_parameters_work_together(http: httpx.Client, n_names: int) -> None:
    """CVE-2026-44223: a combination of parameters ended the engine. Several pairs in a request."""
    extremes: dict[str, tuple[Any, ...]] = {
        "temperature": (0, 2), "top_p": (5e-324, 1), "top_k": (1, -1), "min_p": (0, 1), "n": (2,),
        "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2), "seed": (-1, 2**64 - 1),
        "repetition_penalty": (0.01, 100), "logit_bias": ({"5": -100}, {"5": 100}),
        "min_tokens": (2,), "logprobs": (0, 20), "echo": (True,), "stop": (["a", "e"],),
        "stop_token_ids": ([5],), "ignore_eos": (True,), "skip_special_tokens": (False,),
        "stream": (True,), "max_tokens": (0,),
    }  # fmt: skip
    rng = random.Random(0)
    pairs = {frozenset(pair) for pair in itertools.combinations(extremes, 2)}
    pairs.remove(frozenset({"max_tokens", "min_tokens"}))  # contradict each other
    for names in covering(pairs, n_names):
        fields = {name: rng.choice(extremes[name]) for name in names}
        body = {"prompt": "a", "max_tokens": 2} | fields
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 200 and "internal_error" not in answer.text, fields


def covering(pairs: set[frozenset[str]], size: int) -> Iterator[list[str]]:
    """Groups of at most `size` names whose pairs are in `pairs`, until each pair was in one."""
    left, names = set(pairs), sorted(set().union(*pairs))
    while left:
        group = sorted(min(left, key=sorted))
        while len(group) < size:
            new = {
                name: sum(frozenset({name, one}) in left for one in group)
                for name in names
                if name not in group and all(frozenset({name, one}) in pairs for one in group)
            }
            if not new or max(new.values()) == 0:
                break
            group.append(max(new, key=new.__getitem__))
        left -= {frozenset(pair) for pair in itertools.combinations(group, 2)}
        yield group


def test_no_address_is_opened_for_a_client(http: httpx.Client) -> None:
    """CVE-2026-24779: a URL in any place is refused, or is text."""
    with socket.create_server(("127.0.0.1", 0)) as canary:
        canary.settimeout(0)
        url = f"http://127.0.0.1:{canary.getsockname()[1]}\\@example.com/x"
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "image_url", "image_url": url},
            {"type": "video_url", "video_url": {"url": url}}, {"type": "input_audio", "data": url},
            {"type": "file", "file": {"file_url": url}},
        ]  # fmt: skip
        for part in parts:
            body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
            assert http.post(CHAT, json=body).status_code == 400
        for name in ("image_data", "audio_data", "lora_path", "video_data"):
            assert http.post("/generate", json={"text": "a", name: url}).status_code == 400
        moved = http.post("/update_weights_from_disk", json={"model_path": url})
        assert moved.status_code == 400
        text = http.post("/v1/completions", json={"prompt": url, "max_tokens": 1})
        assert text.status_code == 200
        with pytest.raises(BlockingIOError):
            canary.accept()


def routes_of(core: EngineCore) -> list[Route]:
    app = build_app(EngineThread(core), "tiny", lambda: None)
    return [route for route in app.routes if isinstance(route, Route)]


def test_the_key_is_required_on_every_route(export: Export) -> None:
    """And compared in constant time (CVE-2025-59425). The page at / has no data. A route is tried
    without a key and with one of the wrong ones, in turn."""
    wrong = itertools.cycle(["secre", "secret2", "SECRET", "é", "x" * 5000])
    core = EngineCore(export, EngineOptions(kv_tokens=512))
    routes = routes_of(core)
    assert {"/generate", "/metrics", "/v1/models", "/update_weights_from_disk"} <= {
        r.path for r in routes
    }
    with run_server(core, api_key="secret") as server, httpx.Client(base_url=server.url) as http:
        for route in routes:
            path = route.path.replace("{name:path}", "tiny")
            for method in route.methods or ():
                for key in (None, next(wrong)):
                    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
                    status = http.request(method, path, headers=headers).status_code
                    free = path in ("/health", "/")
                    assert status == (200 if free else 401), (method, path, key)


def test_keys_are_compared_in_constant_time(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the function that exists for it, on digests: of equal length whatever the client sends."""
    lengths: list[tuple[int, int]] = []
    original: Callable[..., bool] = hmac.compare_digest

    def recorded(given: bytes, right: bytes) -> bool:
        lengths.append((len(given), len(right)))
        return original(given, right)

    monkeypatch.setattr(hmac, "compare_digest", recorded)
    core = EngineCore(export, EngineOptions(kv_tokens=512))
    with run_server(core, api_key="secret") as server, httpx.Client(base_url=server.url) as http:
        for key in ("s", "secret", "secret2", "x" * 1000):
            http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
    assert lengths == [(32, 32)] * 4


@pytest.mark.parametrize(
    "seed", [0, 1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_headers_of_weights_are_checked(export_folder: Path, tmp_path: Path, seed: int) -> None:
    """CVE-2026-53923: sizes that overflow, overlap or lie outside of the file."""
    (source,) = export_folder.glob("*.safetensors")
    data = source.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    rng = random.Random(seed)
    numbers = [-1, 0, 2**31, 2**32 + 1, 2**63, 2**64 - 1, 10**30, 1.5, None, "1", True]
    shutil.copytree(export_folder, tmp_path / "m")
    for _ in range(25):
        changed = json.loads(json.dumps(header))
        one = changed[rng.choice(names)]
        key = rng.choice(["shape", "data_offsets"])
        one[key][rng.randrange(len(one[key]))] = rng.choice(numbers)
        text = json.dumps(changed).encode()
        length = rng.choice([len(text)] * 6 + [0, 2**40, 2**64 - 1])
        (tmp_path / "m" / source.name).write_bytes(
            struct.pack("<Q", length) + text + data[8 + size :]
        )
        with pytest.raises(UserError) as caught:
            open_export(tmp_path / "m", device="cpu")
        assert "\n" not in str(caught.value)


def test_errors_are_new_each_time(small_server: RunningServer) -> None:
    """An error object that is raised again keeps the frames, and so the bodies, of all calls."""
    from serve.api import errors

    assert errors.failure("error") is not errors.failure("error")
    assert errors.draining() is not errors.draining()
    assert errors.failure("stop") is None and errors.failure(None) is None


class Watched:
    """A tokenizer that counts what another thread does during its calls."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.turns = 0
        self.during = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def watched(*values: Any, **options: Any) -> Any:
            done, before = threading.Event(), self.turns

            def turn() -> None:
                while not done.wait(0.001):
                    self.turns += 1

            thread = threading.Thread(target=turn)
            thread.start()
            try:
                return getattr(self.tokenizer, name)(*values, **options)
            finally:
                self.during = self.turns - before
                done.set()
                thread.join()

        return watched


def test_other_threads_run_while_a_million_tokens_become_text(
    make_core: Callable[..., EngineCore], tokenizer: Tokenizer
) -> None:
    """They fit into a body of 4 MiB. The library's `decode` holds the interpreter lock."""
    core = make_core()
    watched = Watched(tokenizer)
    core.inputs.tokenizer = watched  # type: ignore[assignment]
    assert len(sglang_control.decode_tokens(core.inputs, [5] * 1_000_000, True)) == 1_000_000
    assert watched.during > 5
