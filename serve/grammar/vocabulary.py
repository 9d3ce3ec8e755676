"""The bytes of every token of a tokenizer, as xgrammar needs them. Used in the worker only."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import xgrammar
from numpy.typing import NDArray
from tokenizers import Tokenizer

from serve.grammar.mask import pack
from serve.text.token_bytes import TokenBytes, special_ids


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens. W words of 32 tokens."""

    tokenizer: Tokenizer
    info: Any
    """xgrammar's TokenizerInfo."""
    tokens: list[bytes]
    """Special tokens are bytes that are in no text: only a grammar that names them allows them. End
    tokens are empty."""
    printable: NDArray[np.int32]
    """`[W]`: tokens without control characters."""
    text: NDArray[np.int32]
    """`[W]`: all tokens but the special ones."""
    not_ends: NDArray[np.int32]
    """`[W]`: all tokens but the end tokens."""
    added: tuple[str, ...]
    """Added tokens that are text, such as `<tool_call>`. They begin anywhere."""

    def begun_token(self, text: str) -> int:
        """Bytes at the end of `text` that may be the beginning of an added token."""
        most = 0
        for token in self.added:
            sizes = range(min(len(token) - 1, len(text)), 0, -1)
            size = next((n for n in sizes if text.endswith(token[:n])), 0)
            most = max(most, len(token[:size].encode()))
        return most


def make_vocabulary(tokenizer: Tokenizer, end_tokens: Collection[int], size: int) -> Vocabulary:
    """size: tokens that may be sampled."""
    ends = sorted(token for token in end_tokens if token < size)
    hidden = special_ids(tokenizer).union(ends)
    known = TokenBytes(tokenizer)
    tokens = [b""] * size
    for i in hidden.difference(ends):
        if i < size:
            tokens[i] = b"\xff%d" % i
    for text, i in tokenizer.get_vocab(with_added_tokens=True).items():
        if i < size and i not in hidden:
            found = known.find(i)
            tokens[i] = text.replace("\u2581", " ").encode() if found is None else found
    info = xgrammar.TokenizerInfo(
        tokens, xgrammar.VocabType.RAW, vocab_size=size, stop_token_ids=ends
    )
    return Vocabulary(
        tokenizer=tokenizer,
        info=info,
        tokens=tokens,
        printable=pack(np.array([min(token, default=32) >= 32 for token in tokens])),
        text=pack(~np.isin(np.arange(size), list(hidden.difference(ends)))),
        added=tuple(one for i, one in known.added.items() if i not in hidden),
        not_ends=pack(~np.isin(np.arange(size), ends)),
    )
