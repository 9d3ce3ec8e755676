"""`python -m scripts.bench_data [DATASET]`: tokens per second of this loader and of others.

    python -m scripts.bench_data prepared/code --seq-len 2048 --rounds 5

DATASET is a folder of scripts.prepare_data; without one, random tokens are written to a temporary
folder. All loaders read the same tokens, shuffled, as batches of int64 inputs and targets:

- ours, 0 and 1 threads: `train.data.batches`, with positions, document boundaries, checksums
- torch: `DataLoader` over a memory-mapped array, RandomSampler, 0 and 2 worker processes
- datasets: a Hugging Face dataset of sequences in torch format under `DataLoader`, 0 and 2 workers

The rounds alternate between the loaders, so that load on the machine affects all alike. A host that
trains reads one rank's share per process; this is one process.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from configs.command_line import CommandParser
from configs.errors import UserError
from configs.paths import local_path
from train.data.batches import TrainingData
from train.dataset.blend import Blend, Share
from train.dataset.order import BlendedEpochs
from train.dataset.prepared import (
    FORMAT,
    INDEX,
    VERSION,
    Split,
    SplitWriter,
    fingerprint_of,
    open_prepared,
)
from train.dataset.sequences import Concatenated, TokenRules

_MEAN_DOCUMENT = 600
_EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


class _Windows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The usual map-style dataset over an array on disk."""

    def __init__(self, tokens: np.ndarray, seq_len: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = index * self.seq_len
        row = torch.from_numpy(self.tokens[start : start + self.seq_len + 1].astype(np.int64))
        return row[:-1], row[1:]


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = CommandParser(prog="python -m scripts.bench_data", description=__doc__)
    parser.add_argument("dataset", nargs="?", help="folder of scripts.prepare_data")
    parser.add_argument("--tokens", type=int, default=2**26, help="of random data")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences per batch")
    parser.add_argument("--seconds", type=float, default=2.0, help="per loader and round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = local_path(options.dataset) if options.dataset else Path(scratch) / "random"
            if not options.dataset:
                _write_random(folder, options.tokens)
            split = open_prepared(folder).splits["train"]
            loaders = _loaders(split, options.seq_len, options.micro_batch, Path(scratch))
            rates: dict[str, list[float]] = {name: [] for name in loaders}
            for _ in range(options.rounds):
                for name, batches in loaders.items():
                    rates[name].append(_rate(batches(), options.seconds))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    best = statistics.median(rates["ours, 1 thread"])
    print(f"{len(split.tokens):,} tokens, sequences of {options.seq_len}, batches of "
          f"{options.micro_batch}, {options.rounds} rounds of {options.seconds:g} s")  # fmt: skip
    for name, found in rates.items():
        rate = statistics.median(found)
        print(f"{name:<22} {rate / 1e6:>8.1f} M tokens/s   ours is {best / rate:.2f} times as fast")
    return 0


def _rate(batches: Iterator[int], seconds: float) -> float:
    """Tokens per second, after the first batch."""
    next(batches)
    began, tokens = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        tokens += next(batches)
    close: Callable[[], None] | None = getattr(batches, "close", None)
    if close is not None:
        close()
    return tokens / spent


def _loaders(
    split: Split, seq_len: int, micro_batch: int, scratch: Path
) -> dict[str, Callable[[], Iterator[int]]]:
    """Iterators over the numbers of tokens of batches, by name."""
    sequences = Concatenated(split, seq_len, TokenRules(0, True, 2**32))
    if not sequences.count:
        raise UserError(f"--seq-len {seq_len}: the dataset has only {len(split.tokens):,} tokens")

    def ours(workers: int) -> Iterator[int]:
        blend = Blend([Share("all", ((0, 1.0),), Fraction(1), None)], 2**40,
                      global_batch=8 * micro_batch, seq_len=seq_len)  # fmt: skip
        data = TrainingData(
            BlendedEpochs(blend, [sequences.count], ["all"], 0), [sequences],
            global_batch=8 * micro_batch, micro_batch=micro_batch, rank=0, n_ranks=1,
        )  # fmt: skip
        for step in data.ahead(1, 2**30, workers, prefetch=2):
            for batch in step:
                yield batch.tokens_T.numel()

    tokens = split.tokens.read(0, sequences.count * seq_len + 1)
    array = scratch / "tokens.npy"
    np.save(array, tokens)
    mapped = np.load(array, mmap_mode="r")
    rows = _table(tokens, seq_len, scratch)

    def torchs(workers: int) -> Iterator[int]:
        windows = _Windows(mapped, seq_len)
        return _sizes(DataLoader(windows, micro_batch, shuffle=True, num_workers=workers))

    def huggingfaces(workers: int) -> Iterator[int]:
        loader = DataLoader(rows, micro_batch, shuffle=True, num_workers=workers)
        return (batch["row"][:, :-1].numel() for _ in iter(int, 1) for batch in loader)

    return {
        "ours, no thread": lambda: ours(0),
        "ours, 1 thread": lambda: ours(1),
        "torch, 0 workers": lambda: torchs(0),
        "torch, 2 workers": lambda: torchs(2),
        "datasets, 0 workers": lambda: huggingfaces(0),
        "datasets, 2 workers": lambda: huggingfaces(2),
    }


def _sizes(loader: "DataLoader[Any]") -> Iterator[int]:
    while True:
        for inputs, _ in loader:
            yield inputs.numel()


def _table(tokens: np.ndarray, seq_len: int, scratch: Path) -> Any:
    """A Hugging Face dataset of the same sequences, memory-mapped, in torch format."""
    import datasets
    import pyarrow as pa

    starts = range(0, len(tokens) - seq_len, seq_len)
    rows = [tokens[start : start + seq_len + 1].astype(np.int32) for start in starts]
    table = pa.table({"row": pa.array(rows, pa.list_(pa.int32()))})
    datasets.disable_progress_bars()
    datasets.Dataset(table).save_to_disk(str(scratch / "table"))
    return datasets.load_from_disk(str(scratch / "table")).with_format("torch")


def _write_random(folder: Path, n_tokens: int) -> None:
    """A dataset of random tokens and documents."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    splits = {}
    for name, size in (("train", n_tokens), ("validation", 0)):
        tokens = rng.integers(1, 2**16, size).astype(np.uint16)
        starts = np.unique(rng.integers(0, max(size, 1), size // _MEAN_DOCUMENT))
        starts = np.union1d([0], starts) if size else starts[:0]
        tokens[starts] = 0
        writer = SplitWriter(folder, name, np.dtype(np.uint16))
        writer.add(tokens, np.diff(starts, append=size), 0)
        splits[name] = writer.close()
    (folder / "tokenizer.json").touch()
    index: dict[str, Any] = {
        "format": FORMAT, "version": VERSION, "dtype": "uint16", "eot": 0, "vocab_size": 2**16,
        "tokenizer_sha256": _EMPTY_SHA256, "splits": splits,
    }  # fmt: skip
    index["fingerprint"] = fingerprint_of(index)
    (folder / INDEX).write_text(json.dumps(index))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
