"""The tokenizer: byte-level BPE, trained here or existing, and the encoding of whole documents.

Byte-level BPE (Radford et al. 2019, after Sennrich et al., arXiv:1508.07909): a regular expression
splits text into words, each word is a string of bytes, and the most frequent pair of neighbors
becomes a new token until the vocabulary is full. Its 256 bytes can represent any text, so there is
no unknown token. Training and encoding use the `tokenizers` library, with one optimization.

The regular expression is Llama 3's, because other programs must split the same way: a GGUF file
does not contain the expression but the name of one that is built into llama.cpp (`llama-bpe` for
this one). Of those, it needs the fewest tokens (docs/data.md). It requires `ignore_merges`, which
llama.cpp implies: a word that is a token becomes that token, regardless of merges.

The optimization: tokens never cross words and code repeats its words, so a corpus of 7.8 million
words has only 95 thousand different ones. On ASCII lines Python's `re` finds the same words as the
library; the library then encodes each new word once. The tokens are the same (tested), for a third
of the CPU time.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from configs.errors import UserError
from configs.paths import local_path

EOT = "<|endoftext|>"
EOT_NAMES = (EOT, "</s>", "<|end_of_text|>", "<｜end▁of▁sentence｜>")  # noqa: RUF001
SPECIAL_FILE = "special_tokens_map.json"
"""Where older folders list their special tokens."""
SMALLEST_VOCAB = 257
BOUNDARIES = 2
"""Version number, increased when the encoder changes its tokens for an existing tokenizer."""
SAMPLE_BYTES = 16 * 2**20
"""A tokenizer is trained on this much text; 31 MB instead of 16 MB saved 0.14% of the tokens."""

WORDS = (
    r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"  # I've; not (?i): \u017f is no s
    r"|[^\r\n\p{L}\p{N}]?[\p{L}]+|[\p{N}]{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The same in ASCII, where \s has the same meaning in both libraries.
_ASCII_WORDS = re.compile(WORDS.replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9"), re.ASCII)
# No word continues after a line end unless only white space follows on the next line.
_LINE_STARTS = re.compile(r"(?<=\n)(?=[ \t]*[!-~])")
_GROUP = 2**20
"""Characters that the library encodes at once: it needs 200 bytes for each."""
_MOST_WORDS = 1_000_000  # then the table of words is cleared: it must not grow with the corpus


def check_vocab_size(vocab_size: int, setting: str = "model.vocab_size") -> None:
    """Raise UserError if the value of `setting` is too small for a byte-level vocabulary."""
    if vocab_size < SMALLEST_VOCAB:
        raise UserError(
            f"{setting} = {vocab_size}: a byte-level tokenizer needs at least "
            f"{SMALLEST_VOCAB} (256 bytes and {EOT})"
        )


def train_tokenizer(
    texts: Callable[[], Iterable[str]],
    vocab_size: int,
    log: Callable[[str], None],
    special_tokens: Sequence[str] = (),
    setting: str = "model.vocab_size",
) -> Tokenizer:
    """Train a tokenizer of exactly `vocab_size` tokens; `<|endoftext|>` is id 0.

    texts: returns a new iterator of the training documents. The first SAMPLE_BYTES of them are
    used, of a document at most as many characters; all are used only if those do not fill the
    vocabulary. special_tokens: further ones, with the
    ids from 1 on. setting: origin of `vocab_size`, for errors. Deterministic. Raises UserError.
    """
    check_vocab_size(vocab_size, setting)
    size = 0
    for limit in (SAMPLE_BYTES, None):
        used = [0, 0]  # documents, bytes
        tokenizer = _new()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOT, *special_tokens],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_first(texts(), limit, used), trainer)
        size = tokenizer.get_vocab_size()
        if size == vocab_size:
            log(f"tokenizer: {size} tokens from {used[0]} documents ({used[1] / 1e6:.3g} MB)")
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{EOT} $A", pair=f"{EOT} $A {EOT} $B:1", special_tokens=[(EOT, 0)]
            )
            return tokenizer
        if limit is not None and used[1] < limit:
            break  # these were all documents
    raise UserError(
        f"{setting} = {vocab_size}: the training documents support {size} tokens; set "
        f"{setting} to {size} or bring more text"
    )


def _new() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _first(texts: Iterable[str], limit: int | None, used: list[int]) -> Iterator[str]:
    """Documents until `limit` bytes are reached; counts documents and bytes in `used`."""
    for text in texts:
        if limit is not None and used[1] >= limit:
            return
        text = text[:limit]  # the library needs 80 bytes for each byte of a document
        used[0] += 1
        used[1] += len(text.encode())
        yield text


def find_tokenizer(setting: str) -> Path:
    """The `tokenizer.json` of `data.tokenizer` (a file or its folder)."""
    path = local_path(setting)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        problem = "the folder has no tokenizer.json" if path.is_dir() else "no such file or folder"
        raise UserError(
            f"data.tokenizer = {setting!r}: {problem}; name a tokenizer.json or its folder"
        )
    return file


def load_tokenizer(file: Path, vocab_size: int) -> tuple[Tokenizer, str]:
    """An existing tokenizer and its end-of-text token; checks that the model has a row per
    token."""
    where = f"data.tokenizer = {str(file)!r}"
    try:
        raw = file.read_bytes()  # the library supports no name that is not UTF-8
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from None
    try:
        tokenizer = Tokenizer.from_buffer(raw)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{where}: not a tokenizer.json: {one_line(error)}") from None
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    rows = max(vocab.values(), default=-1) + 1
    if rows > vocab_size:
        raise UserError(
            f"{where}: it has {rows} tokens, but model.vocab_size = {vocab_size}; "
            f"set model.vocab_size to {rows} or more"
        )
    for name in (_named_end(file), *EOT_NAMES):
        if name in vocab:
            return tokenizer, name
    raise UserError(
        f"{where}: has no end-of-text token; documents need one of {', '.join(EOT_NAMES)}, "
        "or name yours as eos_token in a tokenizer_config.json next to it"
    )


def _named_end(file: Path) -> str:
    """The end-of-text token in the files next to a tokenizer.json; empty for none."""
    settings = settings_beside(file)
    if "eos_token" not in settings:
        settings = settings_beside(file, SPECIAL_FILE)
    return token_name(settings.get("eos_token"))


def settings_beside(file: Path, name: str = "tokenizer_config.json") -> dict[str, Any]:
    """The JSON object in the file `name` next to a tokenizer.json; empty if there is none."""
    place = file.parent / name
    try:
        settings = json.loads(place.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON: {one_line(error)}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{place}: must hold one JSON object")
    return settings


def token_name(token: object) -> str:
    """A special token's text, which settings store directly or in an object; empty for none."""
    return str((token.get("content") if isinstance(token, dict) else token) or "")


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


class Encoder:
    """Converts documents to one stream of token ids."""

    def __init__(self, tokenizer: Tokenizer, eot: int, dtype: np.dtype) -> None:
        """eot: id that begins every document. dtype: of the stream. No truncation, no padding;
        `eot` and special tokens written in a text are plain text, so that no document can forge a
        boundary."""
        self.tokenizer = _without_special_tokens(tokenizer, eot)
        self.eot = eot
        self.dtype = dtype
        self.by_words = cuts_words_as_ours(self.tokenizer)
        self.ids_of: dict[str, list[int]] = {}

    def encode(self, texts: list[str]) -> np.ndarray:
        """The stream of `texts`, `[T]`: for each document `eot`, then its tokens.

        Raises UserError if the tokenizer has no tokens but `eot` for a text.
        """
        segments = [self._segments(text) for text in texts]
        words = [_ASCII_WORDS.findall(s) if ascii else None for s, ascii in chain(*segments)]
        self._learn(chain.from_iterable(w for w in words if w is not None))
        rest = [s for s, ascii in chain(*segments) if not ascii]
        encodings = self._encode_batch(rest)
        found = iter(words)
        pieces = []
        for document in segments:
            pieces.append(np.array([self.eot], dtype=self.dtype))
            for _ in document:
                known = next(found)
                if known is None:
                    pieces.append(np.array(next(encodings), dtype=self.dtype))
                else:
                    ids = chain.from_iterable(map(self.ids_of.__getitem__, known))
                    pieces.append(np.fromiter(ids, dtype=self.dtype))
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def _segments(self, text: str) -> list[tuple[str, bool]]:
        """`text` in pieces that encode separately as they do together, and whether to encode by
        words."""
        if not self.by_words:
            return [(text, False)]
        if text.isascii():
            return [(text, True)]
        lines = groupby(_LINE_STARTS.split(text), str.isascii)
        return [("".join(part), ascii) for ascii, group in lines for part in _grouped(group)]

    def _learn(self, words: Iterable[str]) -> None:
        new = set(words)
        if len(self.ids_of) > _MOST_WORDS:
            self.ids_of.clear()
        missing = list(new.difference(self.ids_of))
        self.ids_of.update(zip(missing, self._encode_batch(missing), strict=True))

    def _encode_batch(self, texts: list[str]) -> Iterator[list[int]]:
        for group in _grouped(texts):
            found = self.tokenizer.encode_batch_fast(group, add_special_tokens=False)
            for text, encoding in zip(group, found, strict=True):
                ids = encoding.ids
                yield self._encode_in_parts(text) if self.eot in ids else ids

    def _encode_in_parts(self, text: str) -> list[int]:
        """The tokens of a text that contains `eot` as a word of the vocabulary: cut within each."""
        ids: list[int] = []
        pending = [text]
        while pending:
            part = pending.pop()
            encoding = self.tokenizer.encode(part, add_special_tokens=False)
            spans = [
                span
                for span, i in zip(encoding.offsets, encoding.ids, strict=True)
                if i == self.eot
            ]
            if not spans:
                ids += encoding.ids
                continue
            cuts = [0, *((start + end) // 2 for start, end in spans), len(part)]
            parts = [part[a:b] for a, b in pairwise(cuts)]
            if not all(parts):
                shown = part[slice(*spans[0])][:20] or part[:20]
                name = self.tokenizer.id_to_token(self.eot)
                raise UserError(
                    f"data.tokenizer: it makes its end-of-text token {name!r} of {shown!r} in a "
                    "document, which would end it there; name another eos_token in the "
                    "tokenizer_config.json next to it"
                )
            pending += reversed(parts)
        return ids


def _grouped(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists of at most _GROUP characters, a longer one alone."""
    group: list[str] = []
    size = 0
    for text in texts:
        if group and size + len(text) > _GROUP:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    if group:
        yield group


def _without_special_tokens(tokenizer: Tokenizer, eot: int) -> Tokenizer:
    """A copy that treats every special token, and `eot` whether special or not, as plain text."""
    parts = json.loads(tokenizer.to_str())
    for token in parts["added_tokens"]:
        token["special"] |= token["id"] == eot
    copy = Tokenizer.from_str(json.dumps(parts))
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def cuts_words_as_ours(tokenizer: Tokenizer) -> bool:
    """Whether text is split by WORDS only, and a word's tokens do not depend on its context."""
    parts: dict[str, Any] = json.loads(tokenizer.to_str())
    return (
        parts["normalizer"] is None
        and parts["pre_tokenizer"] == json.loads(_new().to_str())["pre_tokenizer"]
        and not parts["model"].get("dropout")
        and all(token["special"] for token in parts["added_tokens"])
    )
