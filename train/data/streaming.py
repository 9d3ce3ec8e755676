"""Training on a stream of documents, which are tokenized while the run reads them.

The documents form one endless row of tokens, in the order of the stream. Their sequences are
shuffled within blocks of BLOCK sequences by a keyed permutation. The library's own shuffle is not
used: the documents in its buffer are lost when it continues.

Every rank reads the whole stream and keeps its part, so that the batches depend neither on the
number of ranks nor on the steps prepared ahead. Where a block begins is described by the library's
state before the document in which it does, and the number of tokens of that document that belong to
earlier blocks. A checkpoint has this description of the block that the next step reads.

L sequence length.
"""

import hashlib
import json
import threading
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from configs.errors import ConfigError, UserError
from configs.rules import belongs_to
from configs.schema import JobConfig
from parallel.ranks import Ranks
from train.data.documents import shown
from train.data.hf_stream import StreamedDocuments
from train.data.run_data import RunData, Source
from train.dataset.order import Visits
from train.dataset.permutation import KeyedPermutation
from train.dataset.sequences import Rows, sequences_of
from train.tokenizer.tokenizer import Encoder, find_tokenizer, load_tokenizer

BLOCK = 1024
"""Sequences that are shuffled together."""
_KEPT = 4
"""Blocks in memory: a microbatch may have parts of several."""
_ENDLESS = 2**62
_MOST_DOCUMENTS = 1_000_000
"""Read at most in search of the validation set."""


class DocumentStream:
    """Documents as tokens, without those held out."""

    def __init__(
        self, documents: StreamedDocuments, encoder: Encoder, fraction: float, held_out: bool
    ) -> None:
        """fraction: share of the documents held out. held_out: return these, not the others."""
        self.documents, self.encoder, self.held_out = documents, encoder, held_out
        self._limit = int(fraction * 2**64)

    def next(self) -> tuple[np.ndarray, int]:
        """The tokens of the next document, and the bytes of its text. Raises UserError."""
        epoch = self.documents.epoch
        while self.documents.epoch < epoch + 2:
            raw = (text := self.documents.next()).encode()
            digest = hashlib.blake2b(raw, digest_size=8).digest()
            if (int.from_bytes(digest, "big") < self._limit) == self.held_out:
                return self.encoder.encode([text]), len(raw)
        which = "held out" if self.held_out else "left to train on"
        raise UserError(f"{shown(self.documents.setting)}: no document is {which}")


class StreamedSequences:
    """The sequences of a stream by number. They must be read in the order of their blocks."""

    def __init__(self, stream: DocumentStream, seq_len: int, ahead: int) -> None:
        """ahead: blocks of which the beginnings are remembered."""
        self.stream, self.seq_len, self.eot = stream, seq_len, stream.encoder.eot
        self.count = _ENDLESS
        self.tokens_per_sequence = Fraction(seq_len)
        self._states: deque[tuple[int, dict[str, Any]]] = deque(maxlen=ahead)
        self._blocks: dict[int, np.ndarray] = {}
        self._next = 0
        self._lock = threading.Lock()
        self._document = np.empty(0, np.uint32)
        self._open_document()
        self._states.append((0, self._here()))

    def state(self, block: int) -> dict[str, Any]:
        """Where `block` begins, one that has been read or the next one; JSON."""
        with self._lock:
            while self._next < block:  # steps whose data is skipped
                self._read()
            return next(state for number, state in self._states if number == block)

    def load(self, block: int, state: Mapping[str, Any]) -> None:
        """Continue with `block`. Raises UserError."""
        documents = self.stream.documents
        try:
            before, used, crc = dict(state["documents"]), int(state["used"]), int(state["crc"])
        except (KeyError, TypeError, ValueError):
            raise UserError("data_stream: not the state of a stream") from None
        documents.load(before)
        self._open_document()
        if zlib.crc32(self._document.tobytes()) != crc:
            raise UserError(
                f"{shown(documents.setting)}: row {documents.number:,} is not the one that the "
                "checkpoint has read: the data, or its order, has changed"
            )
        self._before, self._used = before, used
        self._next, self._blocks = block, {}
        self._states.clear()
        self._states.append((block, self._here()))

    def rows(self, numbers: np.ndarray, epochs: np.ndarray) -> Rows:
        length = self.seq_len
        blocks = numbers // BLOCK
        with self._lock:
            while self._next <= int(blocks.max()):
                self._read()
            row = np.concatenate([
                self._blocks[block][(at := (number - block * BLOCK) * length) : at + length + 1]
                for number, block in zip(numbers.tolist(), blocks.tolist(), strict=True)
            ])  # fmt: skip
        window = row.reshape(len(numbers), length + 1).astype(np.int64)
        index_L = np.arange(length)
        opened_BL = np.where(window[:, :-1] == self.eot, index_L, 0)
        positions_BL = index_L - np.maximum.accumulate(opened_BL, axis=1)
        return Rows(window[:, :-1], window[:, 1:], positions_BL)

    def _open_document(self) -> None:
        """Read the next document."""
        self._before = self.stream.documents.state()
        self._document, _ = self.stream.next()
        self._used = 0

    def _here(self) -> dict[str, Any]:
        crc = zlib.crc32(self._document.tobytes())
        return {"documents": self._before, "used": self._used, "crc": crc}

    def _read(self) -> None:
        """Read the tokens of the next block, and look at the first one after it."""
        size = BLOCK * self.seq_len
        parts, n = [], 0
        while n < size:
            part = self._document[self._used : self._used + size - n]
            parts.append(part)
            self._used, n = self._used + len(part), n + len(part)
            if self._used == len(self._document):
                self._open_document()
        after = self._document[self._used : self._used + 1]
        self._blocks[self._next] = np.concatenate([*parts, after])
        self._blocks.pop(self._next - _KEPT, None)
        self._next += 1
        self._states.append((self._next, self._here()))


class BlockShuffle:
    """The order of a stream's sequences: each block in the order of a keyed permutation."""

    def __init__(self, seq_len: int, seed: int) -> None:
        self.seq_len, self.seed = seq_len, seed

    def at(self, visits: np.ndarray) -> Visits:
        blocks, places = np.divmod(visits, BLOCK)
        numbers = np.empty_like(visits)
        for block in np.unique(blocks).tolist():
            rows = blocks == block
            order = KeyedPermutation(BLOCK, self.seed, "stream", block)
            numbers[rows] = block * BLOCK + order(places[rows])
        zeros = np.zeros_like(numbers)
        lengths = np.full_like(numbers, self.seq_len)
        return Visits(np.arange(len(visits)), zeros, zeros, numbers, zeros, lengths)

    def drawn(self, visit: int) -> tuple[int, ...]:
        return (visit * self.seq_len,)

    def read(self, visit: int) -> list[list[int]]:
        return [[visit, 0]]


@dataclass(frozen=True)
class StreamedRunData(RunData):
    """The data of a run that reads a stream: its state has the stream's."""

    stream: StreamedSequences

    def state(self, done: int) -> dict[str, Any]:
        return super().state(done) | {
            "data_stream": json.dumps(self.stream.state(self._block(done)))
        }

    def check_resume(self, state: Mapping[str, Any], done: int) -> None:
        super().check_resume(state, done)
        if "data_stream" not in state:
            raise UserError("data.source: cannot resume: the checkpoint has not read this stream")
        self.stream.load(self._block(done), json.loads(state["data_stream"]))

    def _block(self, done: int) -> int:
        """The block of the first sequence after step `done`."""
        return self._visit(done) // BLOCK


def open_stream(
    config: JobConfig, ranks: Ranks, skipped: list[tuple[int, int]], log: Callable[[str], None]
) -> RunData:
    """Open `data.source = "stream:..."` on all ranks. Raises UserError."""
    data = config.data
    check_stream_settings(config)
    tokenizer_file = find_tokenizer(data.tokenizer)

    def opened(*, held_out: bool) -> DocumentStream:
        tokenizer, eot_token = load_tokenizer(tokenizer_file, config.model.vocab_size)
        eot = tokenizer.token_to_id(eot_token)
        assert eot is not None
        report = log if ranks.is_first and not held_out else _say_nothing
        documents = StreamedDocuments(data.source, data.text_field, report)
        encoder = Encoder(tokenizer, eot, np.dtype(np.uint32))
        return DocumentStream(documents, encoder, data.validation_fraction, held_out)

    held_tokens, held_bytes = ranks.on_every(lambda: _validation_set(config, opened(held_out=True)))
    batch_blocks = (data.prefetch + 2) * config.train.global_batch // BLOCK
    training = ranks.on_every(
        lambda: StreamedSequences(opened(held_out=False), data.seq_len, batch_blocks + 4)
    )
    digest = hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()
    fingerprint = f"{data.source} with the tokenizer {digest}"
    held = sequences_of(held_tokens, data.seq_len, training.eot)
    return StreamedRunData(
        sources=[Source("", fingerprint, training, held, len(held_tokens), held_bytes)],
        order=BlockShuffle(data.seq_len, config.run.seed),
        tokenizer_file=tokenizer_file,
        fingerprint=fingerprint,
        global_batch=config.train.global_batch,
        skipped=skipped,
        lines=[
            f"data: {shown(data.source)}: read as a stream by every rank, tokenized by the way, no "
            f"search for duplicates; validation: the first {held.count:,} sequences held out"
        ],
        stream=training,
    )


def _say_nothing(line: str) -> None:
    """What validation reads is read again in training."""


def check_stream_settings(config: JobConfig) -> None:
    """Raise ConfigError for settings that a stream cannot have."""
    data = config.data
    if not data.tokenizer:
        raise ConfigError(
            "data.tokenizer is empty: a stream is tokenized while it is read; name a tokenizer.json"
        )
    belongs_to(
        data, "a data.source that is no stream", "packing", "fim_rate", "unreadable_rows",
        "near_duplicate_threshold",
    )  # fmt: skip
    if data.workers > 1:
        raise ConfigError(f"data.workers = {data.workers}: a stream is read by one thread; set 1")
    if not config.validation.sequences:
        raise ConfigError(
            "validation.sequences = 0: a stream has no known end; name a number of sequences"
        )


def _validation_set(config: JobConfig, stream: DocumentStream) -> tuple[np.ndarray, int]:
    """The tokens of the first documents held out, as many as validation needs, and the bytes of
    their text."""
    needed = config.validation.sequences * config.data.seq_len + 1
    if not config.data.validation_fraction:
        raise ConfigError("data.validation_fraction = 0: a run needs a validation set")
    parts, n, n_bytes = [], 0, 0
    while n < needed:
        before = stream.documents.state()["epoch"]
        tokens, size = stream.next()
        if stream.documents.epoch != before or stream.documents.number > _MOST_DOCUMENTS:
            break
        parts.append(tokens)
        n, n_bytes = n + len(tokens), n_bytes + size
    if n <= config.data.seq_len:
        raise ConfigError(
            f"data.validation_fraction = {config.data.validation_fraction}: the documents held out "
            f"have {n:,} tokens, not one sequence; hold out more, or use shorter sequences"
        )
    return np.concatenate(parts), n_bytes
