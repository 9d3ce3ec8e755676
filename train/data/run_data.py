"""The data of a run: training order and validation sets, from `data.source` or `data.blend`.

State of the data: how many sequences of each source have been read. It follows from the step and
the settings, and is stored in checkpoints to detect settings with which a resumed run would read
sequences twice, or never.
"""

import hashlib
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from configs.errors import ConfigError, UserError
from configs.paths import local_path
from configs.schema import JobConfig
from parallel.ranks import Ranks
from train.data.batches import TrainingData
from train.data.corpus import Corpus, DamagedCache, open_corpus, prepare
from train.data.documents import shown
from train.dataset import best_fit
from train.dataset.blend import Blend, Share
from train.dataset.fill_in_middle import FillInMiddle
from train.dataset.megatron import is_megatron, open_megatron
from train.dataset.order import BlendedEpochs, Order, ShuffledEpochs, data_step
from train.dataset.prepared import Dataset, Split, open_prepared
from train.dataset.sequences import Concatenated, Packed, Sequences, TokenRules
from train.dataset.tokens import ArrayTokens
from train.tokenizer.tokenizer import find_tokenizer, load_tokenizer


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
        """Sequences of each source up to the data of step `done`, including skipped ones."""
        return self.order.drawn(data_step(done, self.skipped) * self.global_batch if done else 0)

    def state(self, done: int) -> dict[str, Any]:
        """The state after step `done`: a few integers."""
        return {
            "data_sources": [source.fingerprint for source in self.sources],
            "data_sequences": list(self.drawn(done)),
        }

    def check_resume(self, state: Mapping[str, Any], done: int) -> None:
        """Raise UserError if a checkpoint's state is not what these settings give at its step."""
        theirs = dict(
            zip(state.get("data_sources", []), state.get("data_sequences", []), strict=True)
        )
        if not theirs:  # written before this state existed: one source, nothing skipped
            theirs = {self.sources[0].fingerprint: done * self.global_batch}
        ours = dict(zip((s.fingerprint for s in self.sources), self.drawn(done), strict=True))
        for source in self.sources:
            read, expected = theirs.pop(source.fingerprint, 0), ours[source.fingerprint]
            if read != expected:
                raise UserError(
                    f"data: cannot resume: until step {done} the run has read {read:,} sequences "
                    f"of {source.name or 'data.source'}, with these settings it would have read "
                    f"{expected:,}; weights and skip_steps may change only after step {done} "
                    "(data.blend.changes), and a dataset must not change"
                )
        if any(theirs.values()):
            raise UserError(
                "data.blend: cannot resume: a dataset that the run has read is not there, or has "
                "changed; keep it, and set its weight to 0 from a later step on"
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
            tokens = drawn * source.training.tokens_per_sequence
            fields[f"data/{source.name}/tokens"] = float(tokens)
            fields[f"data/{source.name}/epochs"] = drawn / source.training.count
        return fields


Log = Callable[[str], None]


def open_run_data(config: JobConfig, ranks: Ranks, log: Log) -> RunData:
    """Open the data on all ranks; rank 0 first prepares what is not there. Raises UserError."""
    if config.data.blend:
        return _open_blend(config, ranks)
    corpus = _open_corpus(config, ranks, log)
    rules = TokenRules(corpus.eot, True, config.model.vocab_size)
    splits = {
        "train": _split(corpus.train, corpus.train_bytes, corpus),
        "validation": _split(corpus.validation, corpus.validation_bytes, corpus),
    }
    name = corpus.folder.name
    tokenizer_file = corpus.tokenizer_file
    source, lines = _source(
        config, ranks, "", name, corpus.fingerprint, splits, rules, tokenizer_file
    )
    if not source.held_out.count:
        raise _too_small(config, "validation", splits["validation"])
    return RunData(
        sources=[source],
        order=ShuffledEpochs(source.training.count, config.run.seed),
        tokenizer_file=(
            find_tokenizer(config.data.tokenizer) if config.data.tokenizer else tokenizer_file
        ),
        fingerprint=corpus.fingerprint,
        global_batch=config.train.global_batch,
        skipped=config.data.skipped,
        lines=lines,
    )


def _split(tokens: np.ndarray, n_bytes: int, corpus: Corpus) -> Split:
    """One part of a corpus, in which the end-of-text token begins each document."""

    def offsets() -> np.ndarray:
        return np.append(np.flatnonzero(tokens == corpus.eot), len(tokens)).astype(np.int64)

    return Split(ArrayTokens(tokens, shown(corpus.folder)), n_bytes, offsets)


def _open_corpus(config: JobConfig, ranks: Ranks, log: Log) -> Corpus:
    """Rank 0 prepares the corpus (or finds it in the cache), the others open it."""

    def opened() -> Corpus:
        try:
            return open_corpus(folder)
        except (DamagedCache, FileNotFoundError) as error:
            raise ConfigError(str(error)) from None

    folder = Path(ranks.on_first(lambda: str(prepare(config, log).folder)))
    corpus: Corpus = ranks.on_every(opened)
    return corpus


def open_dataset(path: Path) -> Dataset:
    """A folder of scripts.prepare_data, or a pair of Megatron's files. Raises UserError."""
    return open_megatron(path) if is_megatron(path) else open_prepared(path)


def _open_blend(config: JobConfig, ranks: Ranks) -> RunData:
    data = config.data
    opened: list[Dataset] = ranks.on_every(
        lambda: [open_dataset(local_path(source.path)) for source in data.blend]
    )
    tokenizer_file = ranks.on_every(lambda: _tokenizer(config, opened))
    tokenizer, eot_token = load_tokenizer(tokenizer_file, config.model.vocab_size)
    eot = tokenizer.token_to_id(eot_token)
    assert eot is not None
    sources, lines = [], []
    for entry, dataset in zip(data.blend, opened, strict=True):
        if dataset.eot not in (None, eot):
            raise UserError(
                f"data.blend: {shown(dataset.path)}: documents begin with token {dataset.eot}, but "
                f"{eot_token!r} of {shown(tokenizer_file)} is token {eot}; name the tokenizer with "
                "the same tokenizer_config.json"
            )
        rules = TokenRules(eot, dataset.eot is not None, config.model.vocab_size)
        source, said = _source(
            config, ranks, entry.label, entry.label, dataset.fingerprint, dataset.splits, rules,
            tokenizer_file,
        )  # fmt: skip
        sources.append(source)
        lines += said
    shares = [
        Share(
            entry.label,
            (
                (0, entry.weight),
                *(((c.step - 1) * config.train.global_batch, c.weight) for c in entry.changes),
            ),
            source.training.tokens_per_sequence,
            _limit(entry.max_epochs, source.training.count),
        )
        for entry, source in zip(data.blend, sources, strict=True)
    ]
    length = data_step(config.train.steps, data.skipped) * config.train.global_batch
    blend = Blend(shares, length)
    if coarse := blend.coarse(config.train.global_batch):
        lines.append(
            "data.blend: sequences are whole, so over 1,000 steps the share of these sources may "
            f"differ by more than 0.1% of it (by less than 3 sequences): {', '.join(coarse)} "
            "sequences per step; a larger train.global_batch is more exact"
        )
    names = [source.fingerprint for source in sources]
    counts = [source.training.count for source in sources]
    return RunData(
        sources=sources,
        order=BlendedEpochs(blend, counts, names, config.run.seed),
        tokenizer_file=tokenizer_file,
        fingerprint=f"blend with the tokenizer {_digest(tokenizer_file)}",
        global_batch=config.train.global_batch,
        skipped=data.skipped,
        lines=lines,
    )


def _limit(max_epochs: float, count: int) -> int | None:
    return int(Fraction(str(max_epochs)) * count) if max_epochs else None


def _tokenizer(config: JobConfig, datasets: list[Dataset]) -> Path:
    """The tokenizer of all datasets. Raises UserError if they have several, or none."""
    given = config.data.tokenizer
    file = find_tokenizer(given) if given else None
    for dataset in datasets:
        other = dataset.tokenizer_file
        if other is None:
            continue
        if file is None:
            file = other
        elif _digest(file) != _digest(other):
            raise UserError(
                f"data.blend: {shown(dataset.path)} was made with another tokenizer than that of "
                f"{shown(file)}; prepare it again with --tokenizer {shown(file)}"
            )
    if file is None:
        raise ConfigError(
            "data.tokenizer is empty: Megatron's files have no tokenizer; name the tokenizer.json "
            "that made them"
        )
    return file


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _source(
    config: JobConfig,
    ranks: Ranks,
    name: str,
    label: str,
    fingerprint: str,
    splits: Mapping[str, Split],
    rules: TokenRules,
    tokenizer_file: Path,
) -> tuple[Source, list[str]]:
    """The sequences of one source, and messages about it."""
    fim = _fim(config, splits["train"], fingerprint, tokenizer_file, rules)
    lines: list[str] = []
    training = _sequences(config, ranks, splits["train"], label, fingerprint, rules, fim, lines)
    if not training.count:
        raise _too_small(config, "training", splits["train"], label if name else "")
    held = splits.get("validation")
    if held is None or not len(held.tokens):
        nothing = Split(
            ArrayTokens(np.empty(0, np.uint16), label), 0, lambda: np.zeros(1, np.int64)
        )
        held_out = Concatenated(nothing, config.data.seq_len, rules)
        lines.append(f"data: {label} has no validation set")
        return Source(name, fingerprint, training, held_out, 0, 0), lines
    held_out = Concatenated(held, config.data.seq_len, rules)
    if name and not held_out.count:
        lines.append(
            f"data: {label}: the {len(held.tokens):,} tokens held out are fewer than data.seq_len: "
            "it has no validation set"
        )
    return Source(name, fingerprint, training, held_out, len(held.tokens), held.n_bytes), lines


def _sequences(
    config: JobConfig,
    ranks: Ranks,
    split: Split,
    label: str,
    fingerprint: str,
    rules: TokenRules,
    fim: FillInMiddle | None,
    lines: list[str],
) -> Sequences:
    data = config.data
    if data.packing == "concatenate":
        return Concatenated(split, data.seq_len, rules, fim)
    stem = re.sub(r"[^\w.-]+", "-", label)[:40]
    folder = local_path(data.cache_dir) / (
        f"packing-{stem}-{fingerprint[:16]}-{data.seq_len}-{best_fit.VERSION}"
    )

    def build() -> None:
        if not folder.is_dir():
            best_fit.store(folder, data.seq_len, split.offsets)

    ranks.on_first(build)
    packing: best_fit.Packing = ranks.on_every(lambda: best_fit.read(folder))
    lines.append(
        f"data: {label}: best-fit packing: {packing.count:,} sequences, {packing.padding:.2%} "
        f"padding, documents cut {packing.n_cuts:,} times (concatenated: "
        f"{packing.n_cuts_concatenated:,})"
    )
    return Packed(split, packing, rules, fim)


def _fim(
    config: JobConfig, split: Split, fingerprint: str, tokenizer_file: Path, rules: TokenRules
) -> FillInMiddle | None:
    data = config.data
    if not data.fim_rate:
        return None
    tokenizer, _ = load_tokenizer(tokenizer_file, config.model.vocab_size)
    prefix, suffix, middle = (tokenizer.token_to_id(token) for token in data.fim_tokens)
    if prefix is None or suffix is None or middle is None:
        missing = [t for t in data.fim_tokens if tokenizer.token_to_id(t) is None]
        raise ConfigError(
            f"data.fim_tokens: the tokenizer has no {', '.join(missing)}; name tokens that it has, "
            "train one with scripts.prepare_data --special-tokens, or set data.fim_rate = 0"
        )
    return FillInMiddle(
        data.fim_rate, (prefix, suffix, middle), rules.eot, len(split.offsets) - 1,
        seed=config.run.seed, name=f"{zlib.crc32(fingerprint.encode()):08x}",
    )  # fmt: skip


def _too_small(config: JobConfig, what: str, split: Split, label: str = "") -> ConfigError:
    of = f" of {label}" if label else ""
    return ConfigError(
        f"data.seq_len = {config.data.seq_len}: the {what} split{of} has only {len(split.tokens)} "
        "tokens, not one sequence; use shorter sequences or more text"
    )
