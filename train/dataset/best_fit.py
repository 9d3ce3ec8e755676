"""Best-fit packing: sequences of whole documents, with little padding and no needless cuts.

Best-fit decreasing (Johnson 1974; for language models Ding et al., arXiv:2404.10830): documents
from the longest to the shortest, each into the fullest sequence that still has room. A document
longer than a sequence is cut into whole sequences and a rest, and only the rest is packed. Lengths
are counted, not sorted, and sequences with the same contents are one group with a number, so the
time depends on the sequence length and hardly on the number of documents.

A packing is stored in `data.cache_dir`, once per dataset and sequence length, and memory-mapped: 12
bytes per document and 8 per sequence. Building it takes about 40 bytes of memory per document.
"""

import json
import shutil
import uuid
from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.errors import UserError
from train.atomic_files import sync
from train.data.documents import shown

VERSION = 1
_ARRAYS = {"starts": np.int64, "lengths": np.int32, "bounds": np.int64}


@dataclass(frozen=True)
class Packing:
    """Which parts of the documents are in which sequence."""

    seq_len: int
    starts: np.ndarray
    """First token of each piece in the dataset, int64, the pieces of a sequence together."""
    lengths: np.ndarray
    """Tokens of each piece, int32."""
    bounds: np.ndarray
    """First piece of each sequence, and the number of pieces: int64 `[count + 1]`."""
    n_tokens: int
    n_cuts: int
    """How often a document was cut. None of these cuts can be avoided: a document of n tokens needs
    ceil(n / seq_len) sequences, and is cut that often less one."""
    n_cuts_concatenated: int
    """How often documents would be cut if they were concatenated."""

    @property
    def count(self) -> int:
        return len(self.bounds) - 1

    @property
    def padding(self) -> float:
        """Share of the sequences that is padding."""
        return 1 - self.n_tokens / (self.count * self.seq_len) if self.count else 0.0

    def pieces(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts and lengths of the pieces of a sequence."""
        here = slice(self.bounds[number], self.bounds[number + 1])
        return self.starts[here], self.lengths[here]


def pack(offsets: np.ndarray, seq_len: int) -> Packing:
    """Pack documents. offsets: first token of each and the number of all, int64 `[N + 1]`."""
    starts, lengths = offsets[:-1], np.diff(offsets)
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    whole = lengths // seq_len
    # whole sequences: the parts of a long document, one after another
    document = np.repeat(np.arange(len(lengths)), whole)
    part = np.arange(len(document)) - np.repeat(np.cumsum(whole) - whole, whole)
    full_starts = starts[document] + part * seq_len
    rests = lengths - whole * seq_len
    rest_starts = (starts + whole * seq_len)[rests > 0]
    rests = rests[rests > 0]
    order, sizes = _fill(rests, seq_len)
    inner = offsets[1:-1]
    boundaries = np.unique(inner[inner % seq_len == 0])
    return Packing(
        seq_len=seq_len,
        starts=np.concatenate([full_starts, rest_starts[order]]),
        lengths=np.concatenate([np.full(len(full_starts), seq_len), rests[order]]).astype(np.int32),
        bounds=np.concatenate([[0], np.cumsum(np.concatenate([np.ones_like(full_starts), sizes]))]),
        n_tokens=int(lengths.sum()),
        n_cuts=int(((lengths - 1) // seq_len).sum()),
        n_cuts_concatenated=max((int(offsets[-1]) - 1) // seq_len - len(boundaries), 0),
    )


Pattern = tuple[tuple[int, int], ...]
"""(length, how many pieces of it) of the pieces in a sequence."""


def _fill(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """The pieces (numbers of `lengths`, all below `seq_len`) in the order of the sequences, and the
    number of pieces of each sequence."""
    counts = np.bincount(lengths, minlength=seq_len + 1)
    by_length = np.argsort(lengths, kind="stable")
    next_of = np.cumsum(counts) - counts  # index into by_length of the next piece of a length
    order: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    for pattern, n in _patterns(counts, seq_len):
        taken = []
        for length, k in pattern:
            first = next_of[length]
            taken.append(by_length[first : first + n * k].reshape(n, k))
            next_of[length] += n * k
        together = np.concatenate(taken, axis=1)
        order.append(together.reshape(-1))
        sizes.append(np.full(n, together.shape[1]))
    if not order:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return np.concatenate(order), np.concatenate(sizes)


def _patterns(counts: np.ndarray, seq_len: int) -> list[tuple[Pattern, int]]:
    """The contents of the sequences, and how many have each. counts: pieces of each length."""
    groups: dict[int, list[tuple[Pattern, int]]] = defaultdict(list)  # by room left
    rooms: list[int] = []  # that have groups, sorted

    def add(room: int, pattern: Pattern, n: int) -> None:
        if not groups[room]:
            insort(rooms, room)
        groups[room].append((pattern, n))

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            at = bisect_left(rooms, length)
            room = rooms[at] if at < len(rooms) else seq_len
            if at < len(rooms):
                pattern, n = groups[room].pop()
                if not groups[room]:
                    del rooms[at]
            else:
                pattern, n = (), left
            each = min(room // length, left)
            used = min(n, left // each)
            left -= used * each
            add(room - each * length, (*pattern, (length, each)), used)
            if pattern and n > used:
                add(room, pattern, n - used)
    return [entry for room in sorted(groups) for entry in groups[room]]


def store(folder: Path, seq_len: int, offsets: np.ndarray) -> None:
    """Build the packing in `folder` and make it durable. One process calls it."""
    work = folder.with_name(f".building-{uuid.uuid4().hex}")
    work.mkdir(parents=True)
    try:
        _write(pack(offsets, seq_len), work)
        if not folder.is_dir():
            work.rename(folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def read(folder: Path) -> Packing:
    """Open a stored packing. Raises UserError if it is damaged."""
    try:
        info = json.loads((folder / "packing.json").read_text())
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in _ARRAYS
        }
        if {name: len(array) for name, array in arrays.items()} != info.pop("sizes"):
            raise ValueError("its arrays have other sizes")
        return Packing(**{name: a.view(np.ndarray) for name, a in arrays.items()}, **info)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{shown(folder)}: damaged: {error}; delete it") from None


def _write(packing: Packing, work: Path) -> None:
    for name, dtype in _ARRAYS.items():
        np.save(work / f"{name}.npy", getattr(packing, name).astype(dtype), allow_pickle=False)
    keys = ("seq_len", "n_tokens", "n_cuts", "n_cuts_concatenated")
    info = {key: getattr(packing, key) for key in keys}
    info["sizes"] = {name: len(getattr(packing, name)) for name in _ARRAYS}
    (work / "packing.json").write_text(json.dumps(info) + "\n")
    for path in (*work.iterdir(), work):
        sync(path)
