"""Values of fields at their limits, places of log-probabilities, and fields that would change the
answer."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import httpx
import pytest
from tokenizers import Tokenizer

from serve.api.fields import HARMLESS, STRUCTURED, UNSUPPORTED

Greedy = Callable[[Sequence[int], int], list[int]]


class Running(Protocol):
    url: str


@pytest.fixture(scope="module")
def post(server: Running) -> Iterator[Callable[..., httpx.Response]]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield lambda content: client.post(
            "/v1/completions",
            content=content if isinstance(content, str) else json.dumps(content),
        )


NUMBERS = {
    "temperature": (0.0, 2.0),
    "top_p": (5e-324, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 100.0),
    "logit_bias": (-100.0, 100.0),
    "max_tokens": None,
    "n": None,
    "seed": None,
    "top_k": None,
    "logprobs": None,
    "min_tokens": None,
    "priority": None,
}
VALUES = ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1" + "0" * 400, "-1" + "0" * 400]
VALUES += ["-0.0", "5e-324", "-5e-324", "1e-5", "0", "-1", "1.0", "true", "1e308"]


HALVES = [
    pytest.param(name, half, marks=[pytest.mark.slow] * ((place + half) % 2))
    for place, name in enumerate(NUMBERS)
    for half in range(2)
]
"""Every name has every second value by default, its neighbor the others."""


@pytest.mark.parametrize(("name", "half"), HALVES)
def test_numbers_are_used_or_refused(
    post: Callable[..., httpx.Response], name: str, half: int
) -> None:
    for value in VALUES[half::2]:
        shown = f'{{"5": {value}}}' if name == "logit_bias" else value
        answer = post(f'{{"prompt": "a", "max_tokens": 2, "{name}": {shown}}}')
        assert answer.status_code in (200, 400), (value, answer.text)
        limits = NUMBERS[name]
        if limits is not None and value not in ("NaN", "Infinity", "-Infinity", "true"):
            number = float(value) if len(value) < 100 else math.inf * (-1 if "-" in value else 1)
            assert (answer.status_code == 200) == (limits[0] <= number <= limits[1]), value


@pytest.mark.parametrize("value", [5e-324, 1e-30, 1e-6])
def test_tiny_temperatures_are_greedy(
    post: Callable[..., httpx.Response], greedy_reference: Greedy, value: float
) -> None:
    body = {"prompt": [5, 6], "max_tokens": 8, "temperature": value, "ignore_eos": True}
    found = post(body | {"return_token_ids": True}).json()["choices"][0]
    assert found["token_ids"] == greedy_reference([5, 6], 8)


def test_seeds_are_different(post: Callable[..., httpx.Response]) -> None:
    texts = {
        seed: post({"prompt": "a", "seed": seed, "max_tokens": 12}).json()["choices"][0]["text"]
        for seed in (-2, -1, 0, 1, 2, 2**64 - 1)
    }
    assert texts[-1] == texts[2**64 - 1], "modulo 2^64"
    assert len(set(texts.values())) == 5


@pytest.mark.parametrize("text", ["é ü naïve", "日本語 🙂", "plain", "🤷🏽‍♀️<|endoftext|>"])
@pytest.mark.parametrize("stream", [False, True])
def test_text_starts_with_the_token_at_its_offset(
    post: Callable[..., httpx.Response], tokenizer: Tokenizer, text: str, stream: bool
) -> None:
    body = {"prompt": text, "echo": True, "logprobs": 3, "max_tokens": 16, "temperature": 1}
    answer = post(body | {"seed": 3, "ignore_eos": True, "stream": stream})
    choices = (
        [json.loads(line[6:])["choices"][0] for line in answer.text.split("\n\n")[:-2]]
        if stream
        else [answer.json()["choices"][0]]
    )
    whole = "".join(choice["text"] for choice in choices)
    assert whole.startswith(text)
    listed = {
        key: [
            value for choice in choices if choice["logprobs"] for value in choice["logprobs"][key]
        ]
        for key in ("tokens", "text_offset", "top_logprobs", "token_logprobs")
    }
    n_prompt = len(tokenizer.encode(text).ids) if "<" not in text else 0
    assert len(listed["tokens"]) >= n_prompt + 16
    joined = b""
    for token, offset in zip(listed["tokens"], listed["text_offset"], strict=True):
        if token.startswith("bytes:"):
            joined += bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
        elif token != "<|endoftext|>":
            assert whole[offset:].startswith(token)
            joined += token.encode()
    assert joined.decode(errors="replace") == whole
    for token, top, logprob in zip(
        listed["tokens"], listed["top_logprobs"], listed["token_logprobs"], strict=True
    ):
        assert (top is None) == (logprob is None)
        if top is not None:
            assert top[token] == logprob, "the token is among them"
            assert 3 <= len(top) <= 4


def test_logprobs_0_names_the_sampled_token(post: Callable[..., httpx.Response]) -> None:
    found = post({"prompt": "a", "logprobs": 0, "max_tokens": 3}).json()["choices"][0]["logprobs"]
    assert [list(top) for top in found["top_logprobs"]] == [[token] for token in found["tokens"]]


@pytest.mark.parametrize("prompt", [[7], [5, 17, 99, 200]])
def test_max_tokens_0_scores_the_prompt(
    post: Callable[..., httpx.Response], prompt: list[int]
) -> None:
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "temperature": 0}
    none = post(body | {"max_tokens": 0}).json()
    one = post(body | {"max_tokens": 1}).json()
    assert none["usage"]["completion_tokens"] == 0
    assert none["choices"][0]["finish_reason"] == "length"
    found, reference = (answer["choices"][0]["logprobs"] for answer in (none, one))
    assert found == {key: values[:-1] for key, values in reference.items()}
    assert len(found["tokens"]) == len(prompt)
    assert one["choices"][0]["text"].startswith(none["choices"][0]["text"])
    nothing = post({"prompt": prompt, "max_tokens": 0}).json()["choices"][0]
    assert (nothing["text"], nothing["logprobs"]) == ("", None)


def test_the_longest_prompt_fits_without_output(post: Callable[..., httpx.Response]) -> None:
    assert post({"prompt": [5] * 192, "max_tokens": 0}).status_code == 200
    assert post({"prompt": [5] * 193, "max_tokens": 0}).status_code == 400
    assert post({"prompt": [5] * 192, "max_tokens": 1}).status_code == 400


def test_many_stop_strings(post: Callable[..., httpx.Response]) -> None:
    body = {"prompt": "a", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    text = post(body).json()["choices"][0]["text"]
    stops = ["\x01" * 30 + chr(97 + i) for i in range(26)] + [chr(0x4E00 + i) for i in range(37)]
    found = post(body | {"stop": [*stops, text[20:24]]}).json()["choices"][0]
    assert found["text"] == text[: text.find(text[20:24])]
    assert found["finish_reason"] == "stop"


def test_other_chunks_have_no_usage(post: Callable[..., httpx.Response]) -> None:
    body = {"prompt": "a", "max_tokens": 4, "stream": True}
    for include in (True, False):
        answer = post(body | {"stream_options": {"include_usage": include}})
        *chunks, done, end = answer.text.split("\n\n")
        found = [json.loads(chunk[6:]) for chunk in chunks]
        assert (done, end) == ("data: [DONE]", "")
        if include:
            assert all(chunk["usage"] is None for chunk in found[:-1])
            assert found[-1]["usage"]["completion_tokens"] <= 4 and found[-1]["choices"] == []
        else:
            assert all("usage" not in chunk for chunk in found)


def test_special_tokens_can_be_shown(post: Callable[..., httpx.Response]) -> None:
    body = {"prompt": "a", "max_tokens": 3, "logit_bias": {"0": 100}, "ignore_eos": True}
    assert post(body).json()["choices"][0]["text"] == ""
    shown = post(body | {"skip_special_tokens": False, "echo": True, "logprobs": 1})
    choice = shown.json()["choices"][0]
    assert choice["text"] == "<|endoftext|>a" + "<|endoftext|>" * 3
    assert choice["logprobs"]["text_offset"] == [0, 13, 14, 27, 40]


def test_begin_token_can_be_left_out(post: Callable[..., httpx.Response]) -> None:
    counts = [
        post({"prompt": "def", "add_special_tokens": add}).json()["usage"]["prompt_tokens"]
        for add in (True, False)
    ]
    assert counts[0] == counts[1] + 1


@pytest.mark.parametrize("name", sorted(STRUCTURED | UNSUPPORTED))
def test_fields_that_change_the_answer_are_refused(
    post: Callable[..., httpx.Response], name: str
) -> None:
    answer = post({"prompt": "a", "max_tokens": 1, name: "a value that has an effect"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name
    assert answer.json()["error"]["code"] == "unsupported_parameter"


def test_the_same_fields_are_accepted_without_effect(post: Callable[..., httpx.Response]) -> None:
    """All of them in one request; then those that have a second value without an effect, and so
    on."""
    neutral = {name: [None, *values] for name, values in (STRUCTURED | UNSUPPORTED).items()}
    for i in range(max(map(len, neutral.values()))):
        fields = {name: values[i] for name, values in neutral.items() if i < len(values)}
        answer = post({"prompt": "a", "max_tokens": 1} | fields)
        assert answer.status_code == 200, answer.text


def test_harmless_fields_are_ignored(post: Callable[..., httpx.Response]) -> None:
    read = {"model", "rid", "priority", "stream", "stream_options"}
    body = {name: "x" for name in HARMLESS - read} | {"prompt": "a", "max_tokens": 1}
    assert post(body).status_code == 200
    assert HARMLESS.isdisjoint(STRUCTURED | UNSUPPORTED)
