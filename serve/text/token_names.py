"""Names and places of the tokens of one text, for log-probabilities.

The name of a token is the text that it adds after those before it, so `text[offset:]` starts with
it. A token that begins or ends inside a character is named by its bytes, as `bytes:\\xe6\\x97`, at
the place where that character begins; a special token by its own text.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer

from serve.text.detokenizer import Detokenizer
from serve.text.token_bytes import TokenBytes


class TokenNames:
    """Reads the tokens of a text in order.

    prompt: tokens before the text. hidden, unfinished: see `Detokenizer`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        token_bytes: TokenBytes,
        hidden: frozenset[int],
        prompt: Sequence[int] = (),
        unfinished: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.bytes = token_bytes
        self.characters = Detokenizer(tokenizer, hidden, prompt, unfinished)
        self.offset = 0
        """Number of final characters so far."""

    def name(self, candidates: Sequence[int]) -> dict[int, str]:
        """Distinct names of candidates for the next token, the first of which comes next."""
        names: dict[int, str] = {}
        used: set[str] = set()
        for token in candidates:
            if token not in names:
                name = self._name(token, self.characters.preview(token))
                names[token] = f"token_id:{token}" if name in used else name
                used.add(names[token])
        return names

    def add(self, token: int) -> int:
        """Take the next token; returns its offset."""
        offset = self.offset
        self.offset += len(self.characters.add(token))
        return offset

    def bytes_of(self, token: int, name: str) -> list[int]:
        found = self.bytes.find(token)
        return list(name.encode() if found is None else found)

    def _name(self, token: int, text: str | None) -> str:
        if token in self.characters.hidden:
            return self.bytes.added[token]
        if text:
            return text
        found = self.bytes.find(token)
        if found is not None:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)
        alone: str | None = self.tokenizer.decode([token], skip_special_tokens=False)
        return alone or self.tokenizer.id_to_token(token) or f"token_id:{token}"
