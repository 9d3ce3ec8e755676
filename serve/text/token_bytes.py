"""The bytes that a token adds to a text, for tokenizers that split characters.

A byte-level vocabulary writes each byte as one printable character (GPT-2's table); a vocabulary
with byte fallback has tokens such as `<0xE6>`. The tokens of other tokenizers are whole characters.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a runner without text does not need the library
    from tokenizers import Tokenizer

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def special_ids(tokenizer: "Tokenizer") -> frozenset[int]:
    """Tokens that control the model and are no text, such as the begin and the end token."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(token for token, one in added.items() if one.special)


class TokenBytes:
    """Bytes of the tokens of one tokenizer."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.added: dict[int, str] = {token: one.content for token, one in added.items()}
        kinds = set(_decoder_kinds(tokenizer))
        self.byte_level = "ByteLevel" in kinds
        self.byte_fallback = "ByteFallback" in kinds

    def find(self, token: int) -> bytes | None:
        """None if the tokenizer's tokens are not bytes, or the token is not one of them."""
        if token in self.added:
            return self.added[token].encode()
        text = self.tokenizer.id_to_token(token)
        if text is None:
            return None
        if self.byte_level:
            if all(char in _BYTE_OF for char in text):
                return bytes(_BYTE_OF[char] for char in text)
            return None
        if self.byte_fallback and (match := _FALLBACK.fullmatch(text)):
            return bytes([int(match[1], 16)])
        return None

    def unfinished(self, tokens: Sequence[int]) -> int | None:
        """Number of the last tokens that have nothing but the beginning of a UTF-8 character; None
        if the text of `tokens` ends with a whole one. 0: another token has this beginning, too."""
        tail = b""
        sizes: list[int] = []
        for token in reversed(tokens[-4:]):
            found = self.find(token)
            if found is None:
                break
            tail = found + tail
            sizes.append(len(found))
        for n in range(1, min(3, len(tail)) + 1):
            lead = tail[-n]
            if lead >= 0xC0:  # 2, 3 or 4 bytes: n of them are there
                if n >= 2 + (lead >= 0xE0) + (lead >= 0xF0):
                    return None
                return sum(end <= n for end in itertools.accumulate(sizes))
            if lead < 0x80:
                return None
        return None


def _decoder_kinds(tokenizer: "Tokenizer") -> Iterator[str]:
    if tokenizer.decoder is None:
        return
    state = json.loads(tokenizer.decoder.__getstate__())  # the decoder as in tokenizer.json
    for one in [state, *state.get("decoders", [])]:
        yield one["type"]


def _byte_table() -> dict[str, int]:
    """GPT-2's characters of the 256 bytes: printable ones are themselves, the others follow 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_table()
