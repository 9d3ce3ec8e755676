"""`scripts.prepare_data` without its command line: the stages, and the dataset that they make.

1. Find the inputs and divide them into units (`train.prepare.inputs`).
2. Scan every unit: what its documents are (`train.prepare.scanning`), in parallel.
3. Decide which documents are duplicates, and which are held out (`train.prepare.selection`).
4. Train the tokenizer, or take the one that is given.
5. Encode every unit (`train.prepare.encoding`), in parallel.
6. Join the units to the files of `train.dataset.prepared`, and rename the folder.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from train.atomic_files import naming, replace_text, sync
from train.data.documents import shown
from train.dataset.megatron import MegatronWriter
from train.dataset.prepared import (
    FORMAT,
    INDEX,
    SHARD_BYTES,
    SPLITS,
    VERSION,
    SplitWriter,
    fingerprint_of,
    read_index,
)
from train.prepare import statistics
from train.prepare.encoding import kept_documents, open_encoder
from train.prepare.inputs import find_units
from train.prepare.plan import Options, Plan, read_plan
from train.prepare.selection import TRAIN, Decisions, decide, load_decisions
from train.prepare.workers import run_stage
from train.tokenizer.hf_files import kept_settings
from train.tokenizer.tokenizer import (
    SAMPLE_BYTES,
    check_vocab_size,
    find_tokenizer,
    load_tokenizer,
    train_tokenizer,
)

Log = Callable[[str], None]
_JOIN_BYTES = 2**24
_LOCK = ".lock"


@dataclass(frozen=True)
class Output:
    """Where and how the dataset is written; none of it changes the tokens."""

    folder: Path
    n_processes: int = 1
    megatron: bool = False
    """Also write Megatron's pairs of files, to the folder `megatron`."""
    shard_bytes: int = SHARD_BYTES


def prepare_data(options: Options, output: Output, log: Log) -> dict[str, Any]:
    """Prepare a dataset, or continue a preparation; returns its index. Raises UserError."""
    plan = _plan(options, log)
    folder = output.folder.absolute()
    work = folder.with_name(f"{folder.name}.preparing")
    if work.is_dir() and any(work.iterdir()) and not (work / _LOCK).is_file():
        raise UserError(
            f"{shown(work)}: exists and is no unfinished preparation; rename it, or name another "
            "--out"
        )
    if folder.exists():
        index = _existing(folder, plan, output, log)
        if work.is_dir():  # killed after the dataset had its name
            with naming(work), _locked(work):
                _remove(work)
        return index
    work.mkdir(parents=True, exist_ok=True)
    with naming(work), _locked(work):
        _begin(plan, work, log)
        scans = run_stage(plan, work, "scan", output.n_processes, log)
        _check_columns(plan, scans)
        _report_skipped(scans, log)
        decisions = _decisions(plan, work, scans, log)
        _provide_tokenizer(plan, work, decisions, log)
        encoded = run_stage(plan, work, "encode", output.n_processes, log)
        index = _join(plan, work, scans, decisions, encoded, output)
        _publish(work, folder)
    for line in statistics.describe(index["sources"]):
        log(line)
    return index


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Raises UserError if another process prepares in `work`."""
    with open(work / _LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{shown(work)}: another process prepares this dataset") from None
        yield


def _plan(options: Options, log: Log) -> Plan:
    """What to do. Raises UserError for sources and a tokenizer that cannot be used."""
    sha256 = ""
    if options.tokenizer:
        file = find_tokenizer(options.tokenizer)
        load_tokenizer(file, 2**31)  # checked before anything is read
        settings = kept_settings(file, "")
        content = file.read_bytes() + json.dumps(settings, sort_keys=True).encode()
        sha256 = hashlib.sha256(content).hexdigest()
    else:
        check_vocab_size(options.train_vocab, "--train-tokenizer")
    units, stamps, notes = find_units(list(options.sources))
    for note in notes:
        log(note)
    return Plan(options, units, stamps, sha256)


def _existing(folder: Path, plan: Plan, output: Output, log: Log) -> dict[str, Any]:
    """The index of a folder that is there already. Raises UserError if it is another dataset, or
    was written with other settings."""
    try:
        index = read_index(folder)
    except UserError as error:
        raise UserError(f"{shown(folder)}: exists and is no dataset ({error})") from None
    if index.get("plan") != plan.key:
        raise UserError(
            f"{shown(folder)}: has a dataset of other sources or options, or its sources have "
            "changed; name another --out, or remove it"
        )
    if output.megatron and not (folder / "megatron").is_dir():
        raise UserError(
            f"{shown(folder)}: is prepared already, without --megatron; name another --out, or "
            "remove it"
        )
    size = np.dtype(index["dtype"]).itemsize
    for split in SPLITS:
        written = [shard["tokens"] * size for shard in index["splits"][split]["shards"]]
        expected = [output.shard_bytes] * (len(written) - 1)
        if written[:-1] != expected or max(written, default=0) > output.shard_bytes:
            raise UserError(
                f"{shown(folder)}: is prepared already, with files of another --shard-mib; name "
                "another --out, or remove it"
            )
    log(f"{shown(folder)}: is prepared already")
    return index


def _begin(plan: Plan, work: Path, log: Log) -> None:
    """Continue the work in a folder if it is the same, else start anew."""
    try:
        same = read_plan(work).key == plan.key
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        if (work / "scan").is_dir():
            log(f"{shown(work)}: other sources or options, or a source has changed: starting anew")
        # first: a kill later leaves no plan to continue
        (work / "plan.json").unlink(missing_ok=True)
        _clear(work)
        replace_text(work / "plan.json", plan.text())
    elif (work / "scan").is_dir():
        log(f"continuing {shown(work)}")
        for path in work.rglob(".*.partial.*"):
            path.unlink(missing_ok=True)


def _clear(work: Path) -> None:
    for path in work.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove(work: Path) -> None:
    """Remove a folder, its lock last: a kill leaves one that is known to be a preparation's."""
    _clear(work)
    shutil.rmtree(work)


def _check_columns(plan: Plan, scans: list[Any]) -> None:
    """Raise UserError for a source in which no row has the column."""
    for number, name in enumerate(plan.options.sources):
        units = [n for n, unit in enumerate(plan.units) if unit.source == number]
        columns = [scans[n]["column"] for n in units]
        if any(c["found"] for c in columns) or plan.options.unreadable == "skip":
            continue
        for unit, column in zip(units, columns, strict=True):
            if column["missed"]:
                others = ", ".join(shown(other, 50) for other in column["others"])
                raise UserError(
                    f"{shown(name)}: no row has the column "
                    f"{shown(plan.options.text_field, 100)!r}; {shown(plan.units[unit].files[0])} "
                    f"has {others or 'none'}; name another with --text-field, or leave such rows "
                    "out with --unreadable skip"
                )


def _report_skipped(scans: list[Any], log: Log) -> None:
    """Log what is left out; the numbers are in the index, too."""
    listed = [where for found in scans for where in found["listed"]]
    if listed:
        log(f"left out {len(listed):,} or more documents that cannot be read, as {listed[0]}")


def _decisions(plan: Plan, work: Path, scans: list[Any], log: Log) -> Decisions:
    try:
        return load_decisions(work, [found["documents"] for found in scans])
    except (OSError, ValueError):
        return decide(plan, work, log)


def _provide_tokenizer(plan: Plan, work: Path, decisions: Decisions, log: Log) -> None:
    """Write tokenizer.json and tokenizer_config.json, which is last."""
    options = plan.options
    if (work / "tokenizer_config.json").is_file():
        return
    if options.tokenizer:
        file = find_tokenizer(options.tokenizer)
        replace_text(work / "tokenizer.json", file.read_bytes().decode())
    else:
        file = work / "tokenizer.json"
        trained = train_tokenizer(
            lambda: _sample(plan, work, decisions),
            options.train_vocab,
            log,
            options.special_tokens,
            "--train-tokenizer",
        )
        replace_text(file, trained.to_str(pretty=True))
    _, eot_token = load_tokenizer(file, 2**31)
    replace_text(work / "tokenizer_config.json", json.dumps(kept_settings(file, eot_token)))


def _sample(plan: Plan, work: Path, decisions: Decisions) -> Iterator[str]:
    """The training documents, the first SAMPLE_BYTES of them from all units in proportion."""
    total = sum(unit.size for unit in plan.units) or 1
    taken = []
    for number, unit in enumerate(plan.units):
        budget, count = SAMPLE_BYTES * unit.size / total, 0
        for _, text in kept_documents(plan, work, number, decisions, (TRAIN,)):
            yield text
            count += 1
            budget -= len(text.encode())
            if budget <= 0:
                break
        taken.append(count)
    for number, count in enumerate(taken):
        documents = kept_documents(plan, work, number, decisions, (TRAIN,))
        for index, (_, text) in enumerate(documents):
            if index >= count:
                yield text


def _join(
    plan: Plan,
    work: Path,
    scans: list[Any],
    decisions: Decisions,
    encoded: list[Any],
    output: Output,
) -> dict[str, Any]:
    """Write the dataset to the folder `dataset` in `work`; returns its index."""
    target = work / "dataset"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    encoder, vocab_size = open_encoder(work)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(work / name, target / name)
    splits = {
        split: _join_split(work, target, split, len(plan.units), encoder.dtype, output)
        for split in SPLITS
    }
    entries, lengths = statistics.source_statistics(plan, scans, decisions, encoded, work)
    statistics.draw_lengths(entries, lengths, target / "lengths.png")
    index: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": encoder.dtype.name,
        "eot": encoder.eot,
        "vocab_size": vocab_size,
        "tokenizer_sha256": hashlib.sha256((target / "tokenizer.json").read_bytes()).hexdigest(),
        "splits": splits,
        "sources": entries,
        "unreadable": [where for found in scans for where in found["listed"]][:1000],
        "options": asdict(plan.options),
        "plan": plan.key,
    }
    index["fingerprint"] = fingerprint_of(index)
    replace_text(target / INDEX, json.dumps(index, indent=1) + "\n")
    return index


def _join_split(
    work: Path, target: Path, split: str, n_units: int, dtype: np.dtype, output: Output
) -> dict[str, Any]:
    writer = SplitWriter(target, split, dtype, output.shard_bytes)
    megatron = None
    if output.megatron:
        (target / "megatron").mkdir(exist_ok=True)
        megatron = MegatronWriter(target / "megatron" / split, dtype)
    for number in range(n_units):
        counts = json.loads((work / "encode" / f"{number}.json").read_text("utf-8"))[split]
        lengths = np.fromfile(work / "encode" / f"{number}.{split}.lengths.bin", np.int32)
        path = work / "encode" / f"{number}.{split}.tokens.bin"
        if path.stat().st_size != counts["tokens"] * dtype.itemsize:
            raise UserError(f"{shown(path)}: not the size that was written; remove {shown(work)}")
        n_bytes = counts["bytes"]
        with open(path, "rb") as file:
            for part in _parts(lengths, _JOIN_BYTES // dtype.itemsize):
                raw = file.read(int(part.sum()) * dtype.itemsize)
                tokens = np.frombuffer(raw, dtype)
                writer.add(tokens, part, n_bytes)
                n_bytes = 0  # counted once
                if megatron is not None:
                    megatron.add(tokens, part)
    if megatron is not None:
        megatron.close()
    return writer.close()


def _parts(lengths: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """The lengths in parts of about `most` tokens."""
    ends = np.cumsum(lengths, dtype=np.int64)
    start = 0
    while start < len(lengths):
        before = int(ends[start - 1]) if start else 0
        end = max(int(np.searchsorted(ends, before + most, side="right")), start + 1)
        yield lengths[start:end]
        start = end


def _publish(work: Path, folder: Path) -> None:
    """Make the dataset durable, give it its name, and remove the work."""
    target = work / "dataset"
    for path in (*target.rglob("*"), target):
        sync(path)
    target.rename(folder)
    sync(folder.parent)
    _remove(work)
