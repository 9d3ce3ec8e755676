"""What users of other servers had to report. References: full forward passes, and the tokenizer."""

import json
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import httpx
import pytest
from tokenizers import Tokenizer

Greedy = Callable[[Sequence[int], int], list[int]]
Fields = dict[str, Any]


class Running(Protocol):
    url: str
    port: int

    def wait_until_idle(self, seconds: float = 10.0) -> None: ...


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def complete(http: httpx.Client, **fields: Any) -> Any:
    body = {"prompt": "a", "max_tokens": 24, "temperature": 0, "ignore_eos": True} | fields
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def pieces(http: httpx.Client, **fields: Any) -> list[Fields]:
    """The choices of a stream's events."""
    body = {"prompt": "a", "max_tokens": 24, "temperature": 0, "ignore_eos": True, "stream": True}
    answer = http.post("/v1/completions", json=body | fields)
    *events, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event[6:])["choices"][0] for event in events]


def first_complete(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string to be complete; of several, before the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@pytest.mark.parametrize(
    "seed",
    [pytest.param(seed, marks=[] if seed in (0, 1, 4) else pytest.mark.slow) for seed in range(12)],
)
def test_stop_strings(http: httpx.Client, seed: int) -> None:
    """Across the borders of tokens, in streams, several that match at once or within another."""
    sampling = {"temperature": 1, "seed": seed, "max_tokens": 24}
    text = complete(http, **sampling)["choices"][0]["text"]
    rng = random.Random(seed)
    at = rng.randrange(5, len(text) - 6)
    stops = [text[at : at + 6], text[at + 1 : at + 3], text[at : at + 3], "no such text"]
    rng.shuffle(stops)
    stops = stops[: rng.randrange(1, 5)]
    expected, stopped = first_complete(text, stops)
    choice = complete(http, **sampling, stop=stops)["choices"][0]
    assert (choice["text"], choice["finish_reason"] == "stop") == (expected, stopped)
    streamed = pieces(http, **sampling, stop=stops)
    assert "".join(piece["text"] for piece in streamed) == expected
    assert streamed[-1]["finish_reason"] == choice["finish_reason"]


def test_a_character_split_over_tokens_arrives_whole(
    http: httpx.Client, tokenizer: Tokenizer
) -> None:
    """The prompt ends inside of an emoji; the only token that is likely completes it."""
    *begin, last = (tokenizer.token_to_id(char) for char in "ðŁĻĤ")  # its bytes
    call = {"prompt": begin, "logit_bias": {str(last): 100}, "max_tokens": 1, "echo": True}
    assert complete(http, **call)["choices"][0]["text"] == "🙂"
    streamed = pieces(http, **call)
    assert "".join(piece["text"] for piece in streamed) == "🙂"
    half = {"prompt": "a", "logit_bias": {str(begin[0]): 100}, "max_tokens": 3}
    *early, end = pieces(http, **half)
    assert not any("\ufffd" in piece["text"] for piece in early)
    assert (
        "".join(piece["text"] for piece in [*early, end])
        == complete(http, **half)["choices"][0]["text"]
    )


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
def test_leading_spaces_are_kept(http: httpx.Client, tokenizer: Tokenizer, path: str) -> None:
    space = tokenizer.token_to_id("Ġ")
    params: Fields = {"logit_bias": {str(space): 100}, "temperature": 0, "ignore_eos": True}
    if path == "/generate":
        body: Fields = {"text": "a", "sampling_params": params | {"max_new_tokens": 2}}
        assert http.post(path, json=body).json()["text"] == "  "
        return
    body = params | {"max_tokens": 2, "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
    choice = http.post(path, json=body).json()["choices"][0]
    assert (choice["text"] if "text" in choice else choice["message"]["content"]) == "  "


def test_bos_comes_once_and_special_text_is_text(http: httpx.Client, tokenizer: Tokenizer) -> None:
    text = "<|endoftext|>hi"
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    expected = [0, *plain.encode(text, add_special_tokens=False).ids]
    assert http.post("/tokenize", json={"prompt": text}).json()["tokens"] == expected
    found = complete(http, prompt=text, echo=True)
    assert found["usage"]["prompt_tokens"] == len(expected)
    assert found["choices"][0]["text"].startswith(text)


def test_prompts_in_every_form(
    http: httpx.Client, tokenizer: Tokenizer, greedy_reference: Greedy
) -> None:
    texts = ["def add", "日本"]
    ids = [tokenizer.encode(text).ids for text in texts]
    expected = [greedy_reference(one, 6) for one in ids]
    for prompt, wanted in (
        (texts[0], expected[:1]), (ids[0], expected[:1]), (texts[:1], expected[:1]),
        (ids[:1], expected[:1]), (texts, expected), (ids, expected),
        ("", [greedy_reference([0], 6)]), (["", texts[0]], [greedy_reference([0], 6), expected[0]]),
    ):  # fmt: skip
        found = complete(http, prompt=prompt, max_tokens=6, return_token_ids=True)["choices"]
        assert [choice["token_ids"] for choice in found] == wanted
    refused: tuple[Any, ...] = (
        None,
        [],
        [[]],
        [texts[0], ids[0]],
        [5, "a"],
        [None],
        [[5], None],
        5,
        {},
        [[[5]]],
    )
    for bad in refused:
        answer = http.post("/v1/completions", json={"prompt": bad})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt", bad
    without = {"prompt": "", "add_special_tokens": False}
    assert http.post("/v1/completions", json=without).status_code == 400


def test_max_tokens_absent(http: httpx.Client) -> None:
    body = {"prompt": "a", "ignore_eos": True}
    for more in ({}, {"max_tokens": None}):
        found = http.post("/v1/completions", json=body | more).json()
        assert found["usage"]["completion_tokens"] == 16, "OpenAI's default"
        assert found["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_counts_and_reasons_are_exact_at_the_limit(http: httpx.Client, stream: bool) -> None:
    """The last token of the context, an end token as the last one, a stop string there."""
    text = complete(http, max_tokens=8)["choices"][0]["text"]
    end = {"logit_bias": {"0": 100}, "ignore_eos": False}
    for fields, tokens, reason in (
        ({"prompt": [5] * 190, "max_tokens": 2}, 2, "length"),
        ({"prompt": [5] * 191, "max_tokens": 1}, 1, "length"),
        ({"max_tokens": 1, **end}, 1, "stop"),
        ({"max_tokens": 4, **end}, 1, "stop"),
        ({"max_tokens": 4, "min_tokens": 3, **end}, 4, "stop"),
        ({"max_tokens": 8, "stop": [text]}, 8, "stop"),
    ):
        if stream:
            choices = pieces(http, **fields, return_token_ids=True)
            assert [c["finish_reason"] for c in choices][-1] == reason, fields
            assert all(c["finish_reason"] is None for c in choices[:-1])
            assert sum(len(c["token_ids"]) for c in choices) == tokens, fields
        else:
            found = complete(http, **fields)
            assert found["choices"][0]["finish_reason"] == reason, fields
            assert found["usage"]["completion_tokens"] == tokens, fields
            assert found["usage"]["total_tokens"] == tokens + found["usage"]["prompt_tokens"]


def test_streams_of_n_and_prompts_have_right_indices(http: httpx.Client) -> None:
    call: Fields = {"prompt": ["a", "def"], "n": 3, "temperature": 1, "seed": 4}
    whole = [choice["text"] for choice in complete(http, **call)["choices"]]
    assert len(set(whole)) == 6
    texts = dict.fromkeys(range(6), "")
    reasons = dict.fromkeys(range(6), 0)
    for piece in pieces(http, **call):
        texts[piece["index"]] += piece["text"]
        reasons[piece["index"]] += piece["finish_reason"] is not None
    assert list(texts.values()) == whole
    assert set(reasons.values()) == {1}


def test_seeded_results_are_the_same_alone_and_in_a_crowd(
    server: Running, http: httpx.Client
) -> None:
    calls = [
        {"prompt": f"{i % 5} a", "temperature": 1, "seed": i % 3 - 1, "max_tokens": 10 + i % 4}
        for i in range(9)
    ]
    alone = [complete(http, **call)["choices"][0]["text"] for call in calls]
    together: dict[int, str] = {}

    def work(i: int) -> None:
        together[i] = complete(http, **calls[i])["choices"][0]["text"]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(len(calls))] == alone
    server.wait_until_idle()


def test_identical_prompts_at_once(http: httpx.Client, greedy_reference: Greedy) -> None:
    """In one call and in several; with a prefix that is not yet computed for any of them."""
    prompt = [(7 * i) % 250 + 3 for i in range(90)]
    expected = greedy_reference(prompt, 12)
    found: list[list[int]] = []

    def work() -> None:
        answer = complete(http, prompt=[prompt, prompt], max_tokens=12, return_token_ids=True)
        found.extend(choice["token_ids"] for choice in answer["choices"])

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 12


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "\xff",
        "json",
    ],
)
def test_content_types_do_not_matter(http: httpx.Client, kind: str | None) -> None:
    """curl -d sends a form's type with JSON."""
    headers = [] if kind is None else [(b"content-type", kind.encode("latin-1"))]
    body = b'{"prompt": "a", "max_tokens": 1}'
    assert http.post("/v1/completions", content=body, headers=headers).status_code == 200
    form = http.post("/v1/completions", content=b"prompt=a&max_tokens=1", headers=headers)
    assert (form.status_code, form.json()["error"]["code"]) == (400, "invalid_json")


PLACES = ["rid", "tool id", "stop", "kwargs", "whole"]


@pytest.mark.parametrize("third", [0, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", PLACES)
def test_nesting_is_an_error_of_the_client(
    http: httpx.Client, place: str, third: int | None
) -> None:
    """At every depth, also where the interpreter's limit of recursion is; there, by default, every
    place has a third of the depths and the next place another third."""
    near = [*range(930, 1000, 3)]
    if third is not None:
        near = near[(third + PLACES.index(place)) % 3 :: 3]
    for depth in [5, 100, *near, 10_000]:
        deep = "[" * depth + "]" * depth
        path, body = {
            "rid": ("/generate", '{"text": ["a"], "rid": [%s]}'),
            "tool id": (
                "/v1/chat/completions",
                '{"messages": [{"role": "assistant", "tool_calls": '
                '[{"id": %s, "function": {"name": "f"}}]}]}',
            ),
            "stop": ("/v1/completions", '{"prompt": "a", "stop": [%s]}'),
            "kwargs": (
                "/v1/chat/completions",
                '{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, '
                '"chat_template_kwargs": {"x": %s}}',
            ),
            "whole": ("/v1/completions", "%s"),
        }[place]
        answer = http.post(path, content=body % deep)
        allowed = {200, 400} if place == "kwargs" else {400}
        assert answer.status_code in allowed, (depth, answer.text)


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE"])
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics", "/tokenize"]
)
def test_methods(http: httpx.Client, method: str, path: str) -> None:
    answer = http.request(method, path)
    readable = method == "HEAD" and path in ("/v1/models", "/metrics")
    assert answer.status_code == (200 if readable else 405)
    if method == "HEAD":
        assert answer.content == b""
    else:
        assert "allow" in answer.headers and answer.json()["error"]["message"]


def test_long_runs_of_one_character_are_read(http: httpx.Client) -> None:
    for char in "a \n0.é日":
        answer = http.post("/tokenize", json={"prompt": char * 600})
        assert answer.status_code == 200
        ids = answer.json()["tokens"]
        assert http.post("/detokenize", json={"tokens": ids}).json()["text"] == char * 600


def test_many_texts_in_one_call_are_refused(http: httpx.Client) -> None:
    """Each costs time of the one thread that reads large bodies."""
    for path, body in (
        ("/tokenize", {"prompt": ["a"] * 1025}),
        ("/detokenize", {"tokens": [[5]] * 1025}),
    ):
        assert http.post(path, json=body).status_code == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", '{"text": "a", "sampling_params": {"\\ud800\\n": 1}}'),
        ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "\\ud83d"}]}'),
        ("/update_weights_from_disk", '{"model_path": "/no\\u2028such"}'),
    ],
)
def test_errors_are_one_line_of_unicode(http: httpx.Client, path: str, body: str) -> None:
    """Also where they quote the body."""
    answer = http.post(path, content=body)
    assert answer.status_code == 400
    content = answer.json()
    message = content["error"]["message"] if "error" in content else content["message"]
    assert message.isprintable()
