"""The settings of the data: one source that a run tokenizes itself, or a blend of datasets that
`python -m scripts.prepare_data` has tokenized."""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from configs.errors import ConfigError
from configs.rules import belongs_to, between, not_empty, shown

_RANGE = re.compile(r"([0-9]{1,10})(?:-([0-9]{1,10}))?")
_MOST_SOURCES = 1000


@dataclass(frozen=True, kw_only=True)
class WeightChange:
    step: int
    """First step with the new weight."""
    weight: float
    """The weight from that step on. 0: the source is not read."""

    def __post_init__(self) -> None:
        between(self, 2, 2**31, "step")
        between(self, 0.0, 1e9, "weight")


@dataclass(frozen=True, kw_only=True)
class BlendSource:
    path: str
    """Folder written by `scripts.prepare_data`, or Megatron's pair of files without their suffixes
    `.bin` and `.idx`."""
    weight: float
    """Share of the tokens, relative to the weights of the other sources. 0: not read until
    `changes` gives it a weight."""
    max_epochs: float = 0.0
    """Passes over the source, for example 4 or 0.5; afterwards the other sources share its tokens
    in proportion to their weights. 0: no limit. Up to two sequences of the last pass may be left
    out."""
    name: str = ""
    """Name in logs and metrics. Empty: the last part of the path."""
    changes: tuple[WeightChange, ...] = ()
    """Other weights from later steps on, in the order of the steps."""

    def __post_init__(self) -> None:
        not_empty(self, "name a folder of scripts.prepare_data", "path")
        between(self, 0.0, 1e9, "weight")
        between(self, 0.0, 1e9, "max_epochs")
        steps = [change.step for change in self.changes]
        if steps != sorted(set(steps)):
            raise ConfigError(f"changes: the steps {shown(steps)} must increase")
        if "/" in self.name or len(self.name) > 100:
            raise ConfigError(f"name = {shown(self.name)}: at most 100 characters, without /")

    @property
    def label(self) -> str:
        return self.name or self.path.rstrip("/").rpartition("/")[2] or self.path


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    source: str = "stdlib"
    """`stdlib`: the source code of Python's standard library (no download). Otherwise a path to a
    text, JSONL or Parquet file or a folder of them, or the name of a Hugging Face dataset.
    `stream:` and a name or path: read by the `datasets` library while the run trains."""
    text_field: str = "text"
    """Column that holds the document, for JSONL, Parquet and Hugging Face datasets."""
    unreadable_rows: Literal["refuse", "skip"] = "refuse"
    """What to do with unreadable rows of JSONL and Parquet files: a line that is not a JSON object
    or is truncated, a text that is not a string, the rest of a damaged file. `refuse`: an error
    with file and line. `skip`: leave them out, count them in the log and list them in the
    manifest."""
    tokenizer: str = ""
    """Folder or file of an existing `tokenizer.json`. Empty: train a byte-level BPE tokenizer of
    `model.vocab_size` tokens on the training documents; with `blend`: the tokenizer of the
    datasets."""
    seq_len: int = 256
    """Tokens per sequence."""
    validation_fraction: float = 0.02
    """Share of the documents held out for validation (at least one document)."""
    near_duplicate_threshold: float = 0.8
    """Of documents whose estimated Jaccard similarity of lines is at least this, all but one are
    dropped. 1.0 drops exact copies only."""
    cache_dir: str = "cache"
    """Folder of tokenizers, tokenized corpora and packings, shared by runs."""
    blend: tuple[BlendSource, ...] = ()
    """Tokenized datasets to train on, in place of `source`."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How documents fill sequences. `concatenate`: one after another, cut where a sequence ends.
    `best_fit`: only documents longer than a sequence are cut; the rest of a sequence is padding,
    without loss."""
    fim_rate: float = 0.0
    """Share of the documents, in each epoch, that are rearranged for filling in the middle: prefix,
    suffix, middle (arXiv:2207.14255)."""
    fim_tokens: tuple[str, ...] = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    """The tokens before prefix, suffix and middle; the tokenizer must have them."""
    skip_steps: tuple[str, ...] = ()
    """Steps whose data is not trained on, such as ["1200-1300", "1750"]: later steps read the data
    of the steps after them. Only steps that the run has not reached can be added."""
    workers: int = 1
    """Threads that prepare batches ahead. 0: each step prepares its own."""
    prefetch: int = 2
    """Steps whose batches are prepared ahead."""

    def __post_init__(self) -> None:
        between(self, 2, 2**24, "seq_len")
        between(self, 0.0, 0.5, "validation_fraction")
        between(self, 0.0, 1.0, "near_duplicate_threshold", "fim_rate")
        between(self, 0, 64, "workers")
        between(self, 1, 1000, "prefetch")
        not_empty(self, 'use "stdlib", a path, or a dataset name', "source")
        not_empty(self, "name the column that holds the documents", "text_field")
        not_empty(self, "name a folder, for example cache", "cache_dir")
        if len(self.fim_tokens) != 3 or len(set(self.fim_tokens)) != 3:
            raise ConfigError(
                f"fim_tokens = {shown(list(self.fim_tokens))}: must be three different tokens"
            )
        _ = self.skipped  # raises
        if self.blend:
            self._check_blend()

    def _check_blend(self) -> None:
        belongs_to(
            self, "blend = [] (scripts.prepare_data has such options)", "source", "text_field",
            "unreadable_rows", "validation_fraction", "near_duplicate_threshold",
        )  # fmt: skip
        if len(self.blend) > _MOST_SOURCES:
            raise ConfigError(f"blend has {len(self.blend)} sources: at most {_MOST_SOURCES}")
        for what, values in (
            ("name", [source.label for source in self.blend]),
            ("path", [source.path.rstrip("/") for source in self.blend]),
        ):
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise ConfigError(
                    f"blend has two sources with the {what} {shown(twice[0])}; "
                    + ("give each a name" if what == "name" else "add their weights")
                )
        if not any(source.weight for source in self.blend):
            raise ConfigError("blend: all weights of the first step are 0; give one a weight")

    @property
    def skipped(self) -> list[tuple[int, int]]:
        """First and last step of each range of `skip_steps`, in order. Raises ConfigError."""
        ranges = []
        for text in self.skip_steps:
            match = _RANGE.fullmatch(text)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
            if not 1 <= first <= last <= 2**31:
                raise ConfigError(
                    f'skip_steps: {shown(text)} must be a step or a range such as "1200-1300"'
                )
            ranges.append((first, last))
        ranges.sort()
        for before, after in pairwise(ranges):
            if after[0] <= before[1]:
                raise ConfigError(f"skip_steps: the ranges {before} and {after} overlap")
        return ranges
