"""Which tokens of which source each sequence of a blend has: a closed form of its number.

The sequences of a run are numbered 0, 1, ... over all steps. A period is the sequences of 1,000
steps, P = 1,000 * global_batch of them, so P * L tokens. Each source has a whole number of these
tokens: its share by weight, rounded (largest remainders), so off by less than one token. That
number, divided by L, is k whole sequences and a rest of r tokens. `train.dataset.division`
distributes the whole sequences, and the few that the rests fill together, over the period. The
rests follow one another in the latter: n sources share at most n - 1 sequences of 1,000 steps. All
periods are alike, so any P sequences in a row, wherever they begin, have the same number of tokens
of each source. If the shares of a period are whole sequences, none is shared.

A rest continues within a sequence of its source: one is cut into parts of r tokens, in successive
periods. So every token of a source is still read once per epoch. Within a period the sequences of a
source are numbered so: first the one that a rest begins, if one does, then the k whole ones.

Weights count tokens. A packing with padding has fewer in a sequence, so weights are divided by the
mean tokens of the source's sequences; the shares are then exact in sequences, padding included.

Weights change at given steps, and where a source has been read `max_epochs` times; both begin a new
phase with its own periods. A sequence that was cut by then continues there.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

import numpy as np

from configs.errors import ConfigError
from train.dataset.division import Division

STEPS = 1000
"""Steps of a period."""
_SHARED = -1
"""The receiver of the sequences that several sources share."""


@dataclass(frozen=True)
class Share:
    """A source's part of a blend."""

    label: str
    weights: tuple[tuple[int, float], ...]
    """(First sequence, weight), increasing; the first is 0."""
    tokens_per_sequence: Fraction
    """Mean number of tokens with a loss."""
    limit: int | None
    """Sequences after which it is not read any more."""


@dataclass(frozen=True)
class Pieces:
    """Consecutive parts of the given sequences, int64 `[n]` each."""

    rows: np.ndarray
    """Which of these sequences, increasing."""
    sources: np.ndarray
    draws: np.ndarray
    """Number of the source's sequence that is read, over all epochs."""
    starts: np.ndarray
    """First token of the part within that sequence."""
    lengths: np.ndarray


@dataclass(frozen=True)
class _Progress:
    """What a source has been read before a phase."""

    tokens: int = 0
    begun: int = 0
    """Its sequences that have a reader."""
    open: tuple[int, ...] = ()
    """Those of them that rests have not read to the end, in the order in which they do."""
    read: int = 0
    """Tokens read of the first of these."""


@dataclass(frozen=True)
class _Part:
    """A source in one phase."""

    before: _Progress
    whole: int
    """Whole sequences per period."""
    rest: int
    """Further tokens per period."""
    first: int
    """Place of the first of these in the shared sequences of a period."""
    seq_len: int

    def begun_by_rests(self, period: int) -> int:
        """Sequences that rests have begun before a period, without those open before the phase."""
        read = self.before.read + period * self.rest
        return max(-(-read // self.seq_len) - len(self.before.open), 0)

    def whole_draw(self, rank: np.ndarray) -> np.ndarray:
        """Numbers of its whole sequences, from their ranks in the phase."""
        period = rank // self.whole
        read = self.before.read + (period + 1) * self.rest
        by_rests = np.maximum(-(-read // self.seq_len) - len(self.before.open), 0)
        return self.before.begun + rank + by_rests

    def rest_draw(self, index: int) -> int:
        """Number of the sequence that rests read as the `index`-th of the phase."""
        if index < len(self.before.open):
            return self.before.open[index]
        period = (index * self.seq_len - self.before.read) // self.rest
        return self.before.begun + period * self.whole + self.begun_by_rests(period)

    def pieces(self, period: int, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(draw, start, length) of what the shared sequences have of it between two places."""
        begin, end = (min(max(at - self.first, 0), self.rest) for at in (start, stop))
        at, last = (self.before.read + period * self.rest + x for x in (begin, end))
        found = []
        while at < last:
            index, inside = divmod(at, self.seq_len)
            length = min(self.seq_len - inside, last - at)
            found.append((self.rest_draw(index), inside, length))
            at += length
        return found

    def after(self, period: int, partial: bool, whole: int, shared: int) -> _Progress:
        """Its progress in the middle of a period.

        partial: whether the period has begun. whole: sequences read in the phase. shared: places of
        the period's shared sequences that have been read.
        """
        by_rests = self.begun_by_rests(period + int(partial))
        of_rest = period * self.rest + min(max(shared - self.first, 0), self.rest)
        index, read = divmod(self.before.read + of_rest, self.seq_len)
        return _Progress(
            self.before.tokens + whole * self.seq_len + of_rest,
            self.before.begun + whole + by_rests,
            tuple(map(self.rest_draw, range(index, len(self.before.open) + by_rests))),
            read,
        )


class _Phase:
    """Sequences between two changes of the weights."""

    def __init__(
        self, start: int, tokens: Sequence[int], seq_len: int, before: Sequence[_Progress]
    ) -> None:
        """start: its first sequence. tokens: of each source per period."""
        self.start, self.seq_len = start, seq_len
        self.period = sum(tokens) // seq_len
        whole = [n // seq_len for n in tokens]
        rests = [n % seq_len for n in tokens]
        self.parts = [
            _Part(*part, seq_len)
            for part in zip(before, whole, rests, accumulate(rests, initial=0), strict=False)
        ]
        self.n_shared = sum(rests) // seq_len
        self.division = Division({_SHARED: self.n_shared, **dict(enumerate(whole))})

    def after(self, n: int) -> list[_Progress]:
        """Progress of each source after `n` sequences of the phase."""
        counts = self.division.counts(n)
        period, inside = divmod(n, self.period)
        shared = (counts.get(_SHARED, 0) - period * self.n_shared) * self.seq_len
        return [
            part.after(period, inside > 0, counts.get(source, 0), shared)
            for source, part in enumerate(self.parts)
        ]

    def at(self, numbers: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        """Pieces of its sequences: rows, sources, draws, starts, lengths."""
        receivers, ranks = self.division.at(numbers - self.start)
        found: list[tuple[np.ndarray, ...]] = []
        for source in np.unique(receivers[receivers != _SHARED]).tolist():
            rows = np.flatnonzero(receivers == source)
            draws = self.parts[source].whole_draw(ranks[rows])
            sources, lengths = np.full_like(rows, source), np.full_like(rows, self.seq_len)
            found.append((rows, sources, draws, np.zeros_like(rows), lengths))
        shared = [
            (row, source, *piece)
            for row in np.flatnonzero(receivers == _SHARED).tolist()
            for source, piece in self._shared(int(ranks[row]))
        ]
        if shared:
            found.append(tuple(np.array(shared, np.int64).T))
        return found

    def _shared(self, rank: int) -> list[tuple[int, tuple[int, int, int]]]:
        """Sources and pieces of a shared sequence."""
        period, index = divmod(rank, self.n_shared)
        start, stop = index * self.seq_len, (index + 1) * self.seq_len
        firsts = [part.first for part in self.parts]
        found = []
        for source in range(max(bisect_right(firsts, start) - 1, 0), len(firsts)):
            if firsts[source] >= stop:
                break
            found += [(source, piece) for piece in self.parts[source].pieces(period, start, stop)]
        return found


class Blend:
    """The tokens of every sequence of a run."""

    def __init__(
        self, shares: Sequence[Share], length: int, *, global_batch: int, seq_len: int
    ) -> None:
        """length: number of sequences of the run. Raises ConfigError if the sources have fewer, or
        a source not one token in a period."""
        self.shares, self.length, self.seq_len = shares, length, seq_len
        self.period = STEPS * global_batch
        self._phases: list[_Phase] = []
        start, progress = 0, [_Progress()] * len(shares)
        ended: set[int] = set()
        while not self._phases or start < length:
            ended |= {s for s, share in enumerate(shares) if share.limit is not None
                      and progress[s].begun >= share.limit}  # fmt: skip
            tokens = self._tokens(start, ended)
            if tokens is None:
                raise _too_short(shares, start, length)
            phase = _Phase(start, tokens, seq_len, progress)
            self._phases.append(phase)
            start, used_up = self._end(phase, ended)
            ended |= used_up
            progress = phase.after(start - phase.start)
        self._starts = [phase.start for phase in self._phases]

    def at(self, numbers: np.ndarray) -> Pieces:
        """The pieces of the sequences `numbers` (int64, increasing)."""
        phases = np.searchsorted(self._starts, numbers, side="right") - 1
        found = []
        for index in np.unique(phases).tolist():
            rows = np.flatnonzero(phases == index)
            found += [
                (rows[inside], *others) for inside, *others in self._phases[index].at(numbers[rows])
            ]
        if len(found) == 1:
            return Pieces(*found[0])
        columns = [np.concatenate(column) for column in zip(*found, strict=True)]
        order = np.argsort(columns[0], kind="stable")  # the pieces of a sequence stay in order
        return Pieces(*(column[order] for column in columns))

    def drawn(self, number: int) -> tuple[int, ...]:
        """Tokens of each source in the first `number` sequences, with padding."""
        return tuple(progress.tokens for progress in self._after(number))

    def read(self, number: int) -> list[list[int]]:
        """What the first `number` sequences have of each source: [begun, tokens, *open] means
        its sequences 0 to begun - 1 without the `open` ones, of whose first `tokens` are read."""
        return [[p.begun, p.read, *p.open] for p in self._after(number)]

    def _after(self, number: int) -> list[_Progress]:
        phase = self._phases[bisect_right(self._starts, number) - 1]
        return phase.after(number - phase.start)

    def _tokens(self, start: int, ended: set[int]) -> list[int] | None:
        """Tokens per period of each source from sequence `start` on; None if there are none."""
        weights = [Fraction(0)] * len(self.shares)
        for source, share in enumerate(self.shares):
            given = [weight for first, weight in share.weights if first <= start][-1]
            if source not in ended:
                weights[source] = Fraction(str(given)) / share.tokens_per_sequence
        total = sum(weights, Fraction(0))
        if not total:
            return None
        exact = [self.period * self.seq_len * weight / total for weight in weights]
        tokens = [int(x) for x in exact]
        missing = self.period * self.seq_len - sum(tokens)
        for source in sorted(range(len(exact)), key=lambda s: tokens[s] - exact[s])[:missing]:
            tokens[source] += 1
        for share, weight, n in zip(self.shares, weights, tokens, strict=True):
            if weight and not n:
                raise ConfigError(
                    f"data.blend: the weight of {share.label} is less than one token in {STEPS:,} "
                    "steps; raise it, or set it to 0"
                )
        return tokens

    def _end(self, phase: _Phase, ended: set[int]) -> tuple[int, set[int]]:
        """First sequence after a phase, and the sources that have been read up to their limit."""
        changes = {first for share in self.shares for first, _ in share.weights}
        end = min((first for first in changes if first > phase.start), default=self.length)
        end = max(min(end, self.length), phase.start + 1)
        used_up: set[int] = set()
        for source, share in enumerate(self.shares):
            if share.limit is None or source in ended:
                continue
            low, high = phase.start, end  # the least end at which all of it has a reader
            if self._begun(phase, high, source) < share.limit:
                continue
            while high - low > 1:
                middle = (low + high) // 2
                reached = self._begun(phase, middle, source) >= share.limit
                low, high = (low, middle) if reached else (middle, high)
            if self._begun(phase, high, source) > share.limit:
                high -= 1  # that sequence would be one too many
            used_up = used_up | {source} if high == end and used_up else {source}
            end = high
        return end, used_up

    @staticmethod
    def _begun(phase: _Phase, number: int, source: int) -> int:
        return phase.after(number - phase.start)[source].begun


def _too_short(shares: Sequence[Share], start: int, length: int) -> ConfigError:
    names = ", ".join(share.label for share in shares if share.limit is not None)
    return ConfigError(
        f"data.blend: after {start:,} of {length:,} sequences no source is left to read: all "
        f"max_epochs ({names or 'none'}) are read, or the weights are 0; train fewer steps, or "
        "raise max_epochs or a weight"
    )
