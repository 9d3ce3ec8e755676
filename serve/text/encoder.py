"""Text to tokens, such that text of users never becomes a special token.

A user may write `<|im_end|>`; if that became the token, the user could end the turn and write one
in another's name. So special tokens are only those that the tokenizer's post-processor adds and
those that a chat template writes. The user's texts are marked before a template renders them,
and the template's own special tokens after it, with characters that are drawn at random when the
encoder is created.

The library holds the interpreter's lock while it encodes one text, but not for a batch, even of
one text.
"""

import re
import secrets
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer

from serve.engine.sampling_params import RequestError
from serve.text.alternatives import longest_of
from serve.text.detokenizer import TextStream
from serve.text.token_bytes import TokenBytes, special_ids
from serve.text.token_names import TokenNames


class TextEncoder:
    """The tokenizer of an export, for texts of at most `max_tokens` tokens."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.special_ids = special_ids(tokenizer)
        self.bytes = TokenBytes(tokenizer)
        self.longest_text = max_tokens * max(map(len, tokenizer.get_vocab()), default=1)
        """Characters of the longest text that could fit."""
        added = tokenizer.get_added_tokens_decoder()
        self.special_tokens = {added[token].content: token for token in self.special_ids}
        """By text."""
        self._mark = "".join(chr(0x100000 + secrets.randbelow(0xFFFD)) for _ in range(4))
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True  # their texts are text
        self._texts = sorted(self.special_tokens)
        self._special = re.compile(longest_of(self._texts))
        self._restored = re.compile(f"{self._mark}([0-9]+){self._mark}")
        self._id_of: dict[int, int] = {}
        """Tokens of marked special tokens, and the special tokens."""
        for token in sorted(self.special_ids):
            self._add_marked(token, added[token])

    def _add_marked(self, token: int, special: AddedToken) -> None:
        text = self._mark + special.content
        marked = AddedToken(text, lstrip=special.lstrip, rstrip=special.rstrip, normalized=False)
        self._tokenizer.add_tokens([marked])
        new = self._tokenizer.token_to_id(text)
        assert new is not None
        self._id_of[new] = token

    def encode(
        self, text: str, add_special_tokens: bool = True, param: str = "prompt"
    ) -> list[int]:
        """Tokens of a text. add_special_tokens: with those that the tokenizer adds to each text.

        Raises RequestError, naming `param`, if the text is not Unicode, can never fit, or has
        characters for which the tokenizer has no token.
        """
        if len(text) > self.longest_text:
            raise RequestError(
                f"{param} has {len(text)} characters; at most {self.longest_text} can fit",
                param,
                code="context_length_exceeded",
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError(f"{param} is not valid Unicode", param) from None
        try:
            (found,) = self._tokenizer.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
        except Exception as error:  # the library raises bare Exception
            raise RequestError(f"the tokenizer cannot encode {param}: {error}", param) from None
        return [self._id_of.get(token, token) for token in found.ids]

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The whole characters of `tokens`."""
        unfinished = self.bytes.unfinished(tokens)
        whole = tokens[: len(tokens) - (unfinished or 0)]
        text: str = self.tokenizer.decode(whole, skip_special_tokens=skip_special_tokens)
        return text if unfinished is None else text.rstrip("\ufffd")

    def stream(
        self,
        stops: Sequence[str],
        prompt: Sequence[int],
        skip_special_tokens: bool,
        shown: Sequence[int] = (),
    ) -> TextStream:
        """The text after `prompt`. shown: special tokens that are text nevertheless."""
        hidden = self.special_ids.difference(shown) if skip_special_tokens else frozenset[int]()
        return TextStream(self.tokenizer, stops, hidden, prompt, self.bytes.unfinished(prompt))

    def names(self, prompt: Sequence[int], skip_special_tokens: bool) -> TokenNames:
        """The names of the tokens after `prompt`."""
        hidden = self.special_ids if skip_special_tokens else frozenset[int]()
        unfinished = self.bytes.unfinished(prompt)
        return TokenNames(self.tokenizer, self.bytes, hidden, prompt, unfinished)

    def mark_text(self, text: str) -> str:
        """A user's text for a template: texts of special tokens become placeholders."""
        return self._special.sub(
            lambda match: f"{self._mark}{self._texts.index(match[0])}{self._mark}", text
        )

    def encode_rendered(self, text: str, param: str) -> list[int]:
        """Tokens of a template's result, whose special tokens are tokens; placeholders are text."""
        text = self._special.sub(lambda match: self._mark + match[0], text)
        text = self._restored.sub(lambda match: self._texts[int(match[1])], text)
        return self.encode(text, add_special_tokens=False, param=param)
