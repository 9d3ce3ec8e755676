"""Sequences of a dataset by number: input tokens, positions and targets.

`Concatenated`: the documents form one row of tokens, of which sequence i is the part from i L to
(i + 1) L. `Packed` (see `train.dataset.best_fit`): a sequence is a list of whole documents, or of
parts of documents that are longer than a sequence, and padding.

Positions restart with each document and each sequence. The target of a token is the next token of
its document. After the last token of a document it is the end-of-text token, if that begins the
next document in the data; otherwise there is no target (IGNORE), and for padding neither.

B sequences, L their length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Protocol

import numpy as np

from configs.errors import UserError
from kernels.layers.cross_entropy import IGNORE
from train.dataset.best_fit import Packing
from train.dataset.fill_in_middle import FillInMiddle
from train.dataset.prepared import Split
from train.dataset.tokens import ArrayTokens


@dataclass(frozen=True)
class Rows:
    """Sequences, int64 `[B, L]` each."""

    tokens_BL: np.ndarray
    targets_BL: np.ndarray
    positions_BL: np.ndarray

    def cut(self, start: int, stop: int) -> "Rows":
        """The tokens `start` to before `stop` of each; positions begin there."""
        inside_L = np.arange(start, stop)
        opened_BL = np.where(self.positions_BL[:, start:stop] == 0, inside_L, start)
        return Rows(
            self.tokens_BL[:, start:stop],
            self.targets_BL[:, start:stop],
            inside_L - np.maximum.accumulate(opened_BL, axis=1),
        )

    @staticmethod
    def joined(parts: "Sequence[Rows]") -> "Rows":
        """Parts of sequences, one after another in each."""
        names = [field.name for field in fields(Rows)]
        return Rows(*(np.concatenate([getattr(part, name) for part in parts], axis=1)
                      for name in names))  # fmt: skip


class Sequences(Protocol):
    seq_len: int
    count: int
    tokens_per_sequence: Fraction
    """Mean number of tokens that are no padding."""

    def rows(self, numbers: np.ndarray, epochs: np.ndarray) -> Rows:
        """The sequences `numbers`, read in `epochs`, int64 `[B]` each. Raises UserError."""
        ...


@dataclass(frozen=True)
class TokenRules:
    """How the ids of a dataset are read."""

    eot: int
    """The end-of-text token."""
    begins_with_eot: bool
    """Whether it begins every document, and is nowhere else."""
    vocab_size: int
    """Ids from this on are an error."""


class Concatenated:
    """Consecutive parts of one row of tokens."""

    def __init__(
        self, split: Split, seq_len: int, rules: TokenRules, fim: FillInMiddle | None = None
    ) -> None:
        self.split, self.seq_len, self.rules, self.fim = split, seq_len, rules, fim
        self.count = max((len(split.tokens) - 1) // seq_len, 0)
        self.tokens_per_sequence = Fraction(seq_len)

    def rows(self, numbers: np.ndarray, epochs: np.ndarray) -> Rows:
        tokens, length = self.split.tokens, self.seq_len
        window = np.empty((len(numbers), length + 1), tokens.dtype)
        for row, number in zip(window, numbers.tolist(), strict=True):
            row[:] = tokens.read(number * length, (number + 1) * length + 1)
        _check_ids(window, numbers * length, self.split, self.rules)
        window = window.astype(np.int64)
        is_first = self._first_tokens(window, numbers)
        index_L = np.arange(length)
        opened_BL = np.where(is_first[:, :-1], index_L, 0)
        positions_BL = index_L - np.maximum.accumulate(opened_BL, axis=1)
        tokens_BL, targets_BL = window[:, :-1], window[:, 1:]
        if not self.rules.begins_with_eot:
            targets_BL = np.where(is_first[:, 1:] & (targets_BL != self.rules.eot), IGNORE,
                                  targets_BL)  # fmt: skip
        if self.fim is not None:
            tokens_BL, targets_BL = tokens_BL.copy(), targets_BL.copy()
            for row, number in enumerate(numbers.tolist()):
                starts = np.flatnonzero(positions_BL[row] == 0)
                _fill_in(self.fim, tokens_BL[row], targets_BL[row], starts,
                         number * length + starts, [*starts[1:], length],
                         self.split.offsets, int(epochs[row]))  # fmt: skip
        return Rows(tokens_BL, targets_BL, positions_BL)

    def _first_tokens(self, window: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Which tokens begin a document, bool `[B, L + 1]`."""
        if self.rules.begins_with_eot:
            return window == self.rules.eot
        found = np.zeros(window.shape, bool)
        offsets = self.split.offsets
        for row, number in zip(found, numbers.tolist(), strict=True):
            start = number * self.seq_len
            first, end = np.searchsorted(offsets, [start, start + self.seq_len + 1])
            row[offsets[first:end] - start] = True
        return found


def sequences_of(tokens: np.ndarray, seq_len: int, eot: int) -> Concatenated:
    """The sequences of an array in which `eot` begins each document."""

    def offsets() -> np.ndarray:
        return np.append(np.flatnonzero(tokens == eot), len(tokens)).astype(np.int64)

    split = Split(ArrayTokens(tokens, "array"), 0, offsets)
    return Concatenated(split, seq_len, TokenRules(eot, True, 2**32))


class Packed:
    """Sequences of whole documents and padding."""

    def __init__(
        self,
        split: Split,
        packing: Packing,
        rules: TokenRules,
        fim: FillInMiddle | None = None,
    ) -> None:
        self.split, self.packing, self.rules, self.fim = split, packing, rules, fim
        self.seq_len, self.count = packing.seq_len, packing.count
        mean = Fraction(packing.n_tokens, max(packing.count, 1))
        self.tokens_per_sequence = mean.limit_denominator(10**6)

    def rows(self, numbers: np.ndarray, epochs: np.ndarray) -> Rows:
        shape = (len(numbers), self.seq_len)
        tokens_BL = np.full(shape, self.rules.eot, np.int64)
        targets_BL = np.full(shape, IGNORE, np.int64)
        positions_BL = np.empty(shape, np.int64)
        for row, (number, epoch) in enumerate(zip(numbers.tolist(), epochs.tolist(), strict=True)):
            starts, lengths = self.packing.pieces(number)
            place = 0
            for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
                here = slice(place, place + length)
                tokens_BL[row, here], targets_BL[row, here] = self._piece(start, length)
                positions_BL[row, here] = np.arange(length)
                place += length
            positions_BL[row, place:] = np.arange(self.seq_len - place)
            if self.fim is not None:
                ends = np.cumsum(lengths)
                _fill_in(self.fim, tokens_BL[row], targets_BL[row], ends - lengths, starts,
                         ends.tolist(), self.split.offsets, epoch)  # fmt: skip
        return Rows(tokens_BL, targets_BL, positions_BL)

    def _piece(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets of a part of a document."""
        found = self.split.tokens.read(start, min(start + length + 1, len(self.split.tokens)))
        _check_ids(found[None], np.array([start]), self.split, self.rules)
        found = found.astype(np.int64)
        eot, offsets = self.rules.eot, self.split.offsets
        if len(found) == length:  # the last document
            last = eot if self.rules.begins_with_eot else IGNORE
            return found, np.append(found[1:], last)
        targets = found[1:].copy()
        if targets[-1] != eot:
            at = np.searchsorted(offsets, start + length)
            if offsets[at] == start + length:
                targets[-1] = IGNORE
        return found[:-1], targets


def _fill_in(
    fim: FillInMiddle,
    tokens_L: np.ndarray,
    targets_L: np.ndarray,
    begins: np.ndarray,
    starts: np.ndarray,
    ends: Sequence[int],
    offsets: np.ndarray,
    epoch: int,
) -> None:
    """Rearrange the documents of one sequence. begins, ends: of each document within the sequence;
    starts: of each within the row of tokens."""
    documents = np.searchsorted(offsets, starts, side="right") - 1
    chosen = fim.chosen(documents, epoch)
    for at in np.flatnonzero(chosen).tolist():
        here = slice(int(begins[at]), int(ends[at]))
        fim.rearrange(tokens_L[here], targets_L[here], int(starts[at]), epoch)


def _check_ids(window: np.ndarray, starts: np.ndarray, split: Split, rules: TokenRules) -> None:
    """Raise UserError for an id outside of the vocabulary. starts: of the rows, in the data."""
    signed = window.dtype.kind == "i"
    if not window.size or (window.max() < rules.vocab_size and (not signed or window.min() >= 0)):
        return
    row, column = np.argwhere((window >= rules.vocab_size) | (window < 0))[0].tolist()
    place = split.tokens.place(int(starts[row]) + column)
    raise UserError(
        f"{place}: token id {window[row, column]}, but model.vocab_size = {rules.vocab_size}: the "
        "data belongs to another tokenizer"
    )
