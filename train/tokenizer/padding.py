"""Adds a separate padding token to a tokenizer trained here.

Padding with the end-of-text token has a drawback: the usual collators remove every padding token
from the loss, and with it the end of each answer, so that a fine-tuned model never learns to stop.
A trained tokenizer has exactly `model.vocab_size` tokens and no unused row; but it has a token for
each of the 256 bytes, and some bytes occur in no UTF-8 text. The token of one of these, 0xFF, is in
no training data and in no merge. In the export it is renamed to `<|pad|>`: all texts keep their
ids, and no weight changes.
"""

import json
from typing import Any

from tokenizers import Tokenizer

from train.tokenizer.tokenizer import EOT, cuts_words_as_ours

PAD = "<|pad|>"
_BYTE_FF = "ÿ"
"""The byte 0xFF in a byte-level vocabulary."""


def with_padding(tokenizer: Tokenizer) -> Tokenizer | None:
    """`tokenizer` with `PAD`, if necessary renamed; None if it was not trained here."""
    parts: dict[str, Any] = json.loads(tokenizer.to_str())
    vocabulary: dict[str, int] = parts["model"].get("vocab") or {}
    if not cuts_words_as_ours(tokenizer) or vocabulary.get(EOT) != 0:
        return None
    if PAD in vocabulary:
        return tokenizer
    # if the byte can occur, its token is in a merge, or an added token
    used = json.dumps([parts["model"]["merges"], parts["added_tokens"]], ensure_ascii=False)
    if _BYTE_FF not in vocabulary or _BYTE_FF in used:
        return None
    vocabulary[PAD] = vocabulary.pop(_BYTE_FF)
    parts["added_tokens"].append(
        {"id": vocabulary[PAD], "content": PAD, "special": True, "normalized": False,
         "single_word": False, "lstrip": False, "rstrip": False}
    )  # fmt: skip
    return Tokenizer.from_str(json.dumps(parts))
