"""Opens the data of a run: a corpus of `data.source`, or the datasets of `data.blend`."""

import hashlib
import re
import zlib
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np

from configs.data import BlendSource
from configs.errors import ConfigError, UserError
from configs.paths import local_path
from configs.schema import JobConfig
from parallel.ranks import Ranks
from train.data.corpus import Corpus, DamagedCache, open_corpus, prepare
from train.data.documents import shown
from train.data.hf_stream import is_stream
from train.data.run_data import RunData, Source
from train.data.streaming import open_stream
from train.dataset import best_fit
from train.dataset.blend import Blend, Share
from train.dataset.fill_in_middle import FillInMiddle
from train.dataset.megatron import is_megatron, open_megatron
from train.dataset.order import MOST_IN_MEMORY, BlendedEpochs, ShuffledEpochs, data_step
from train.dataset.prepared import Dataset, Split, open_prepared
from train.dataset.sequences import Concatenated, Packed, Sequences, TokenRules
from train.dataset.tokens import ArrayTokens
from train.tokenizer.tokenizer import find_tokenizer, load_tokenizer

Log = Callable[[str], None]


def open_run_data(
    config: JobConfig, ranks: Ranks, skipped: list[tuple[int, int]], log: Log
) -> RunData:
    """Open the data on all ranks; rank 0 first prepares what is not there. Raises UserError.

    skipped: intervals of steps whose data is not read, in order.
    """
    if config.data.blend:
        return _open_blend(config, ranks, skipped)
    if is_stream(config.data.source):
        return open_stream(config, ranks, skipped, log)
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
        order=ShuffledEpochs(source.training.count, config.data.seq_len, config.run.seed),
        tokenizer_file=(
            find_tokenizer(config.data.tokenizer) if config.data.tokenizer else tokenizer_file
        ),
        # not the order of runs from before it was keyed
        fingerprint=corpus.fingerprint
        + (" in keyed order" if source.training.count > MOST_IN_MEMORY else ""),
        global_batch=config.train.global_batch,
        skipped=skipped,
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


def _open_blend(config: JobConfig, ranks: Ranks, skipped: list[tuple[int, int]]) -> RunData:
    data = config.data
    opened: list[Dataset] = ranks.on_every(
        lambda: [open_dataset(local_path(source.path)) for source in data.blend]
    )
    _check_different(opened)
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
            _limit(entry, source.training.count),
        )
        for entry, source in zip(data.blend, sources, strict=True)
    ]
    length = data_step(config.train.steps, skipped) * config.train.global_batch
    blend = Blend(
        shares, length, global_batch=config.train.global_batch, seq_len=config.data.seq_len
    )
    names = [source.fingerprint for source in sources]
    counts = [source.training.count for source in sources]
    return RunData(
        sources=sources,
        order=BlendedEpochs(blend, counts, names, config.run.seed),
        tokenizer_file=tokenizer_file,
        fingerprint=f"blend with the tokenizer {_digest(tokenizer_file)}",
        global_batch=config.train.global_batch,
        skipped=skipped,
        lines=lines,
    )


def _check_different(datasets: list[Dataset]) -> None:
    """Raise UserError for the same dataset under two names: both would read the same sequences."""
    known: dict[str, Dataset] = {}
    for dataset in datasets:
        first = known.setdefault(dataset.fingerprint, dataset)
        if first is not dataset:
            raise UserError(
                f"data.blend: {shown(first.path)} and {shown(dataset.path)} are the same dataset, "
                "whose sequences would be read twice; add their weights"
            )


def _limit(entry: BlendSource, count: int) -> int | None:
    """Sequences after which a source is not read any more. Raises ConfigError if it is none."""
    if not entry.max_epochs:
        return None
    limit = int(Fraction(str(entry.max_epochs)) * count)
    if not limit:
        raise ConfigError(
            f"data.blend: max_epochs = {entry.max_epochs} of {entry.label} is less than one of its "
            f"{count:,} sequences; raise it, or set its weight to 0"
        )
    return limit


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
        f"padding; longer documents are cut {packing.n_cuts:,} times, which cannot be avoided, and "
        f"others never (concatenated: {packing.n_cuts_concatenated - packing.n_cuts:,} cuts more)"
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
