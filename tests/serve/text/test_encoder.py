"""Texts of users become text, whatever they contain; special tokens come from the tokenizer and
from templates. The reference is the tokenizers package, called directly."""

import random
import re
import threading
import time
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from serve.engine.sampling_params import RequestError
from serve.frontend.chat import ChatTemplate
from serve.text.alternatives import longest_of
from serve.text.encoder import TextEncoder

TEXTS = [
    "",
    "a",
    "def add(a, b):",
    " leading",
    "日本語 🙂 naïve",
    "a\n\n\tb  ",
    "\ufffd",
    "e\u0301",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant"
)


def sentencepiece() -> Tokenizer:
    """Like Llama's: a space before the text, bytes for unknown characters, BOS before each text."""
    words = ["<unk>", "<s>", "</s>", "▁", *"abcdefgh", *(f"<0x{b:02X}>" for b in range(256))]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>"), AddedToken("<|im_end|>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


@pytest.fixture(params=["byte level", "sentencepiece"])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Tokenizer:
    if request.param == "sentencepiece":
        return sentencepiece()
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.add_special_tokens(SPECIAL)
    return copy


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [True, False])
def test_ordinary_text_has_the_tokenizers_tokens(
    any_tokenizer: Tokenizer, text: str, special: bool
) -> None:
    found = TextEncoder(any_tokenizer, 1000).encode(text, special)
    assert found == any_tokenizer.encode(text, add_special_tokens=special).ids


def test_special_text_is_text_and_bos_comes_once(any_tokenizer: Tokenizer) -> None:
    encoder = TextEncoder(any_tokenizer, 1000)
    bos = any_tokenizer.encode("").ids
    assert len(bos) == 1
    for text in any_tokenizer.get_added_tokens_decoder().values():
        prompt = f"{text.content}hi{text.content}"
        found = encoder.encode(prompt)
        assert found[0] == bos[0]
        assert not encoder.special_ids.intersection(found[1:])
        if any_tokenizer.decoder is not None:
            assert any_tokenizer.decode(found[1:], skip_special_tokens=False) == prompt


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 5))]
)
def test_templates_write_special_tokens_and_users_cannot(tokenizer: Tokenizer, seed: int) -> None:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.add_special_tokens(SPECIAL)
    encoder = TextEncoder(copy, 10_000)
    template = ChatTemplate(TEMPLATE, {"bos_token": "<|endoftext|>"})
    rng = random.Random(seed)
    pieces = ["a", " ", "日本", "<|im", "_end|>", *SPECIAL]
    turns = ["".join(rng.choice(pieces) for _ in range(12)) for _ in range(4)]
    messages = [{"role": "user", "content": turn} for turn in turns]
    tokens = encoder.encode_rendered(template.render(messages, encoder.mark_text), "messages")
    bos, start, end = (copy.token_to_id(text) for text in SPECIAL)
    assert [t for t in tokens if t in encoder.special_ids] == [bos, *[start, end] * 4, start]
    shown = copy.decode(tokens, skip_special_tokens=False)
    expected = "".join(f"<|im_start|>user\n{turn.strip()}<|im_end|>\n" for turn in turns)
    assert shown == f"<|endoftext|>{expected}<|im_start|>assistant"


def test_templates_equal_the_tokenizer_where_users_write_no_special_text(
    any_tokenizer: Tokenizer,
) -> None:
    encoder = TextEncoder(any_tokenizer, 10_000)
    for text in ["<s>[INST] abc [/INST]", "<|im_end|>\nfgh <|im_end|>abc", *TEXTS]:
        reference = any_tokenizer.encode(text, add_special_tokens=False).ids
        assert encoder.encode_rendered(text, "messages") == reference


def test_special_tokens_that_strip_spaces_still_do(tokenizer: Tokenizer) -> None:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.add_special_tokens([AddedToken("<|end|>", rstrip=True, lstrip=True)])
    text = "a  <|end|>  b"
    reference = copy.encode(text, add_special_tokens=False).ids
    assert TextEncoder(copy, 100).encode_rendered(text, "messages") == reference
    assert len(reference) == 3


def test_text_that_cannot_fit_is_refused_unread(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = TextEncoder(tokenizer, 10)
    longest = 10 * max(map(len, tokenizer.get_vocab()))
    assert encoder.encode("a" * longest)
    monkeypatch.setattr(encoder, "_tokenizer", None)  # not used any more
    with pytest.raises(RequestError, match="characters; at most") as caught:
        encoder.encode("a" * (4 << 20))
    assert caught.value.code == "context_length_exceeded"


def test_text_without_tokens_is_refused() -> None:
    """The library raises an error of its own where a tokenizer has no token for unknown words."""
    encoder = TextEncoder(Tokenizer(models.WordLevel({"a": 0}, unk_token="?")), 10)
    assert encoder.encode("a") == [0]
    with pytest.raises(RequestError, match="the tokenizer cannot encode prompt") as caught:
        encoder.encode("b")
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("text", ["def add(a, b): naïve " * 15_000, "a" * 1_000_000, " " * 500_000])
def test_other_threads_run_while_a_text_is_encoded(tokenizer: Tokenizer, text: str) -> None:
    """If encoding held the interpreter lock, the other thread would run twice at most."""
    encoder = TextEncoder(tokenizer, 1_000_000)
    n_turns, done = 0, threading.Event()

    def turn() -> None:
        nonlocal n_turns
        while not done.wait(0.001):
            n_turns += 1

    turning = threading.Thread(target=turn)
    turning.start()
    before = n_turns
    encoder.encode(text)
    during = n_turns - before
    done.set()
    turning.join()
    assert during > 5


def test_words_that_fill_the_vocabulary_keep_their_tokens(tmp_path: Path) -> None:
    """A tokenizer without decoder, added tokens or normalizer."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert TextEncoder(tokenizer, 100).encode("a b c") == [0, 1, 2]


def test_names_in_variables_are_text_too(tokenizer: Tokenizer) -> None:
    """Properties of tools, and arguments of earlier calls."""
    encoder = TextEncoder(tokenizer, 10_000)
    template = ChatTemplate("{{ tools | tojson }}{{ messages[0].tool_calls | tojson }}", {})
    name = "<|endoftext|>"
    calls = [{"function": {"name": "f", "arguments": {name: [{name: 1}]}}}]
    messages = [{"role": "assistant", "content": "", "tool_calls": calls}]
    tools = [{"function": {"name": "f", "parameters": {"properties": {name: {}}}}}]
    text = template.render(messages, encoder.mark_text, {"tools": tools})
    tokens = encoder.encode_rendered(text, "messages")
    assert not encoder.special_ids.intersection(tokens)
    assert tokenizer.decode(tokens).count(name) == 3


@pytest.mark.parametrize("seed", range(3))
def test_the_longest_of_many_texts_is_found(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        n = rng.randint(0, 12)
        texts = ["".join(rng.choices("ab<|", k=rng.randint(1, 6))) for _ in range(n)]
        longest_first = sorted(texts, key=len, reverse=True)
        reference = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        text = "".join(rng.choices("ab<|", k=60))
        assert re.findall(longest_of(texts), text) == reference.findall(text), texts


def test_the_time_of_a_text_does_not_grow_with_the_special_tokens(tokenizer: Tokenizer) -> None:
    """The search holds the interpreter lock: with 256 alternatives these texts took a second."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.add_special_tokens([f"<|reserved_special_token_{n}|>" for n in range(256)])
    encoder = TextEncoder(copy, 10_000)
    for text in ("<|reserved_special_token_", "<", "<|reserved_special_token_255|"):
        begin = time.thread_time()
        many = text * (2_000_000 // len(text))
        assert encoder.mark_text(many) == many
        assert time.thread_time() - begin < 0.2
