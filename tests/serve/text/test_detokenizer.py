"""Text is emitted in whole characters, and never after the start of a stop string."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models

from serve.text.detokenizer import Detokenizer, StopMatcher, TextStream

TEXTS = [
    "plain words, nothing else",
    "日本語のテキスト、漢字とかな",
    "🙂🤷🏽‍♀️ emoji 👩‍👩‍👧‍👦 families",
    "naïve café — “quotes” and\n\n\ttabs  ",
    "mixed 🙂日本 a\u0301 \U0001f1ef\U0001f1f5",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    stream = Detokenizer(tokenizer)
    pieces = [stream.add(token) for token in tokenizer.encode(text).ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text
    assert stream.finish() == ""


def test_half_a_character_is_held_until_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🙂", add_special_tokens=False).ids
    alphabet = [tokenizer.token_to_id(char) or 0 for char in "ðŁĻĤ"]  # the bytes of the smile
    stream = Detokenizer(tokenizer)
    assert [stream.add(token) for token in [ids[0], *alphabet[:3]]] == ["a", "", "", ""]
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("seed", range(5))
def test_random_tokens_equal_one_decode(tokenizer: Tokenizer, seed: int) -> None:
    """Also bytes that never form a character."""
    rng = random.Random(seed)
    ids = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(400)]
    stream = Detokenizer(tokenizer)
    text = "".join(stream.add(token) for token in ids) + stream.finish()
    assert text == tokenizer.decode(ids)


def test_leading_spaces_survive_a_sentencepiece_decoder() -> None:
    """Such decoders strip the first space of a text, and write unknown characters as bytes."""
    words = ["<unk>", "▁Hello", "▁big", "▁world", "!", *(f"<0x{b:02X}>" for b in range(256))]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    smile = [5 + byte for byte in "🙂".encode()]
    stream = Detokenizer(tokenizer)
    pieces = [stream.add(token) for token in [1, 2, *smile, *smile, 3, 4]]
    assert pieces == ["Hello", " big", "", "", "", "🙂", "", "", "", "🙂", " world", "!"]


def test_stop_strings_cross_borders() -> None:
    matcher = StopMatcher(["END"])
    assert [matcher.add(piece) for piece in ["one E", "N", "two EN", "D more"]] == [
        "one ",
        "",
        "ENtwo ",
        "",
    ]
    assert matcher.stopped
    assert matcher.finish() == ""


def test_what_looked_like_a_stop_is_given_back() -> None:
    matcher = StopMatcher(["aab", "zz"])
    assert [matcher.add("xaa"), matcher.add("a"), matcher.finish()] == ["x", "a", "aa"]
    assert not matcher.stopped


@pytest.mark.parametrize("seed", range(60))
def test_any_cut_finds_the_same_stop(seed: int) -> None:
    """The first of several that is complete, and the longest of those that end there."""
    rng = random.Random(seed)
    letters = "ab" if seed % 2 else "abcd"
    text = "".join(rng.choice(letters) for _ in range(60))
    at = rng.randrange(50)
    stops = ["".join(rng.choice(letters) for _ in range(rng.randint(2, 9))) for _ in range(3)]
    stops += [text[at : at + 8], text[at + 2 : at + 7], text[at + 1 : at + 8]]
    stops = rng.sample(stops, rng.randint(1, 6))
    matcher, out, rest = StopMatcher(stops), "", text
    while rest and not matcher.stopped:
        cut = rng.randint(1, 12)
        out += matcher.add(rest[:cut])
        assert not any(stop in out for stop in stops)
        rest = rest[cut:]
    out += matcher.finish()
    ends = (end for end in range(1, 61) if text[:end].endswith(tuple(stops)))
    end = next(ends, None)
    if end is None:
        assert (out, matcher.matched) == (text, None)
    else:
        longest = max((stop for stop in stops if text[:end].endswith(stop)), key=len)
        assert (out, matcher.matched) == (text[: end - len(longest)], longest)


def test_stream_stops_inside_a_token(tokenizer: Tokenizer) -> None:
    stream, out = TextStream(tokenizer, ["jumps o"]), ""
    for token in tokenizer.encode("The quick brown fox jumps over the lazy dog.").ids:
        out += stream.add(token)
        if stream.stopped:
            break
    assert stream.stopped
    assert out + stream.finish() == "The quick brown fox "


def test_held_bytes_may_complete_a_stop_string(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["a\ufffd"])
    half = tokenizer.token_to_id("ð") or 0
    out = "".join(
        stream.add(t) for t in [*tokenizer.encode("xa", add_special_tokens=False).ids, half]
    )
    assert out + stream.finish() == "x"
    assert stream.stopped


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.n_decoded = 0

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        self.n_decoded += len(tokens)
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_bytes_that_never_become_text_cost_the_same_each(
    tokenizer: Tokenizer, fallback: bool, seed: int
) -> None:
    """A logit bias makes a model write such bytes for as long as its context is."""
    if fallback:
        words = [f"<0x{byte:02X}>" for byte in range(256)]
        tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, []))
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        ids = [0xFF, 0xE6, 0x97, 0xA5]
    else:
        vocab = tokenizer.get_vocab()
        ids = [vocab[char] for char in "ÿæĹ¥"]
    rng = random.Random(seed)
    tokens = [ids[0] if seed == 0 else rng.choice(ids) for _ in range(1500)]
    counting = Counting(tokenizer)
    characters = Detokenizer(counting, frozenset())  # type: ignore[arg-type]
    pieces = [characters.add(token) for token in tokens]
    assert counting.n_decoded < 150 * len(tokens)
    text = "".join(pieces) + characters.finish()
    if not fallback or seed == 0:  # with others it depends on where a run of bytes begins
        assert text == tokenizer.decode(tokens, skip_special_tokens=False)
    assert "".join(pieces[-300:])
