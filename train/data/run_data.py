"""The data of a run: training order and validation sets, from `data.source` or `data.blend`.

State of the data: how many tokens of each source have been read. It follows from the step and
the settings, and is stored in checkpoints to detect settings with which a resumed run would read
sequences twice, or never.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.errors import UserError
from train.data.batches import TrainingData
from train.dataset.order import Order, data_step
from train.dataset.sequences import Sequences


@dataclass(frozen=True)
class Source:
    """One source of a run."""

    name: str
    """Empty for `data.source`."""
    fingerprint: str
    training: Sequences
    held_out: Sequences
    """Count 0: it has no validation set."""
    held_out_tokens: int
    held_out_bytes: int
    """UTF-8 bytes of their text; 0: not known."""


@dataclass(frozen=True)
class RunData:
    """Everything that a run reads."""

    sources: list[Source]
    order: Order
    tokenizer_file: Path
    fingerprint: str
    """Changes if the data is other data, so that no run may resume with it."""
    global_batch: int
    skipped: list[tuple[int, int]]
    lines: list[str]
    """Messages for the user."""

    @property
    def by_source(self) -> bool:
        """Whether losses are reported for each source."""
        return bool(self.sources[0].name)

    @cached_property
    def validated(self) -> list[Source]:
        """The sources with a validation set."""
        return [source for source in self.sources if source.held_out.count]

    def training(self, micro_batch: int, rank: int, n_ranks: int, pin: bool) -> TrainingData:
        """The microbatches of one rank."""
        return TrainingData(
            self.order,
            [source.training for source in self.sources],
            global_batch=self.global_batch,
            micro_batch=micro_batch,
            rank=rank,
            n_ranks=n_ranks,
            skipped=self.skipped,
            pin=pin,
        )

    def drawn(self, done: int) -> tuple[int, ...]:
        """Tokens of each source, with padding, up to the data of step `done`, including skipped
        ones."""
        return self.order.drawn(self._visit(done))

    def _visit(self, done: int) -> int:
        """The number of the first sequence after step `done`."""
        return data_step(done, self.skipped) * self.global_batch if done else 0

    def state(self, done: int) -> dict[str, Any]:
        """The state after step `done`: a few integers."""
        return {
            "data_sources": [source.fingerprint for source in self.sources],
            "data_tokens": list(self.drawn(done)),
            "data_read": self._read(done),
        }

    def _read(self, done: int) -> list[str]:
        """Which tokens of each source have been read after step `done`: numbers, as a checkpoint
        has them."""
        return [" ".join(map(str, part)) for part in self.order.read(self._visit(done))]

    def check_resume(self, state: Mapping[str, Any], done: int) -> None:
        """Raise UserError if a checkpoint's state is not what these settings give at its step."""
        seq_len = self.sources[0].training.seq_len
        read_tokens = state.get("data_tokens")
        if read_tokens is None:  # older checkpoints count sequences
            read_tokens = [n * seq_len for n in state.get("data_sequences", [])]
        theirs = _sums(state.get("data_sources", []), read_tokens)
        if not theirs:  # written before this state existed: one source, nothing skipped
            theirs = {self.sources[0].fingerprint: done * self.global_batch * seq_len}
        fingerprints = [source.fingerprint for source in self.sources]
        ours = _sums(fingerprints, self.drawn(done))
        for source in self.sources:
            read, expected = theirs.get(source.fingerprint, 0), ours[source.fingerprint]
            if read != expected:
                raise UserError(
                    f"data: cannot resume: until step {done} the run has read {read:,} tokens "
                    f"of {source.name or 'data.source'}, with these settings it would have read "
                    f"{expected:,}; weights and skip_steps may change only after step {done} "
                    "(data.blend.changes), and a dataset must not change"
                )
        if any(read for source, read in theirs.items() if source not in ours):
            raise UserError(
                "data.blend: cannot resume: a dataset that the run has read is not there, or has "
                "changed; keep it, and set its weight to 0 from a later step on"
            )
        # as many tokens, but not the same ones: a small change of a weight
        read_parts = state.get("data_read")
        if read_parts is not None and _parts(state["data_sources"], read_parts) != _parts(
            fingerprints, self._read(done)
        ):
            raise UserError(
                f"data.blend: cannot resume: until step {done} the run has not read the sequences "
                "that it would have read with these weights, so some would be read twice and "
                f"others never; weights may change only after step {done} (data.blend.changes)"
            )

    def step_fields(self, done: int, sums: Tensor, tp_size: int) -> dict[str, float]:
        """Metrics of step `done` by source: loss, and tokens and epochs read until then.

        sums: loss and targets of the step over all ranks, `[2, sources]`. tp_size: ranks that count
        the same targets.
        """
        fields: dict[str, float] = {}
        losses, targets = sums.tolist()
        for source, drawn, loss, n in zip(
            self.sources, self.drawn(done), losses, targets, strict=True
        ):
            if n:
                fields[f"loss/{source.name}"] = loss / (n / tp_size)
            sequences = Fraction(drawn, source.training.seq_len)
            tokens = sequences * source.training.tokens_per_sequence
            fields[f"data/{source.name}/tokens"] = float(tokens)
            fields[f"data/{source.name}/epochs"] = float(sequences / source.training.count)
        return fields


def _sums(sources: Sequence[str], tokens: Sequence[int]) -> dict[str, int]:
    """Tokens by fingerprint, of which older checkpoints may have one several times."""
    sums: dict[str, int] = {}
    for source, n in zip(sources, tokens, strict=True):
        sums[source] = sums.get(source, 0) + n
    return sums


def _parts(sources: Sequence[str], read: Sequence[str]) -> list[tuple[str, str]]:
    """What has been read by fingerprint, without sources of which nothing was read."""
    return sorted(pair for pair in zip(sources, read, strict=True) if pair[1] != "0 0")
