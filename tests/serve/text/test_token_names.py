"""Every token's place in the text and its name there."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models

from serve.text.detokenizer import Detokenizer, TextStream
from serve.text.encoder import TextEncoder
from serve.text.token_bytes import TokenBytes

TEXTS = [
    "é ü naïve",
    "plain words",
    "日本語のテキスト",
    "🙂🤷🏽‍♀️ a",
    "a\u0301 \U0001f1ef\U0001f1f5 “q”",
]


def sentencepiece() -> Tokenizer:
    words = ["<unk>", "<s>", "▁Hello", "▁big", "▁world", "!", "▁"]
    words += [f"<0x{b:02X}>" for b in range(256)]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    tokenizer.add_special_tokens(["<s>", "<unk>"])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def assert_named(tokenizer: Tokenizer, tokens: list[int]) -> None:
    """Names are at their offsets in the text; bytes join to the text's bytes."""
    encoder = TextEncoder(tokenizer, 1000)
    names = encoder.names((), True)
    text = tokenizer.decode(tokens)
    joined = b""
    for token in tokens:
        name = names.name([token])[token]
        offset = names.add(token)
        if token in encoder.special_ids:
            assert name == tokenizer.id_to_token(token)
        elif name.startswith("bytes:"):
            joined += bytes(names.bytes_of(token, name))
            assert (
                text[:offset].encode()
                == joined.decode(errors="ignore").encode()[: len(text[:offset].encode())]
            )
        else:
            assert text[offset:].startswith(name), (text, offset, name)
            joined += name.encode()
    assert joined.decode() == text


@pytest.mark.parametrize("text", TEXTS)
def test_names_are_at_their_offsets(tokenizer: Tokenizer, text: str) -> None:
    assert_named(tokenizer, tokenizer.encode(text).ids)


def test_names_of_a_sentencepiece_tokenizer_have_their_spaces() -> None:
    smile = [7 + byte for byte in "🙂".encode()]
    assert_named(sentencepiece(), [1, 2, 3, *smile, 1, 4, 5])


def test_split_characters_are_told_apart(tokenizer: Tokenizer) -> None:
    names = TextEncoder(tokenizer, 100).names((), True)
    first, second = (tokenizer.token_to_id(char) or 0 for char in "ðŁ")
    assert set(names.name([first, second]).values()) == {"bytes:\\xf0", "bytes:\\x9f"}


def test_candidates_with_the_same_text_have_different_names() -> None:
    tokenizer = sentencepiece()
    byte = 7 + ord("!")
    names = TextEncoder(tokenizer, 100).names([2], True).name([5, byte])
    assert names == {5: "!", byte: f"token_id:{byte}"}


@pytest.mark.parametrize("seed", range(10))
def test_a_stream_with_special_tokens_equals_one_decode(seed: int) -> None:
    """Decoders strip the first space of what they get, so a window must not begin with it."""
    tokenizer, rng = sentencepiece(), random.Random(seed)
    smile = [7 + byte for byte in "🙂".encode()]
    tokens = [t for _ in range(60) for t in rng.choice([[1], [1, 1], [2], [3], [5], [6], smile])]
    stream = Detokenizer(tokenizer)
    assert "".join(map(stream.add, tokens)) + stream.finish() == tokenizer.decode(tokens)


@pytest.mark.parametrize("cut", range(1, 12))
def test_an_output_continues_the_text_of_its_prompt(cut: int) -> None:
    """With its leading space, and also inside a character."""
    tokenizer = sentencepiece()
    encoder = TextEncoder(tokenizer, 100)
    tokens = [1, 2, 3, *(7 + byte for byte in "🙂é".encode()), 1, 4, 5]
    prompt, output = tokens[:cut], tokens[cut:]
    unfinished = encoder.bytes.unfinished(prompt)
    stream = TextStream(tokenizer, [], None, prompt, unfinished)
    text = "".join(map(stream.add, output)) + stream.finish()
    assert encoder.decode(prompt) + text == tokenizer.decode(tokens)


def test_only_the_beginning_of_a_character_is_unfinished(tokenizer: Tokenizer) -> None:
    found = TokenBytes(tokenizer)
    id_of = tokenizer.token_to_id
    for text, expected in [
        ("ð", 1), ("ðŁĻ", 3), ("ðŁĻĤ", None), ("ï¿½", None), ("a", None), ("Ĥ", None), ("að", 1),
    ]:  # fmt: skip
        assert found.unfinished([id_of(char) or 0 for char in text]) == expected
