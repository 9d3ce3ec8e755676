"""Second pass over a unit: the tokens of the documents that were kept."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from train.atomic_files import naming
from train.data.documents import shown
from train.data.rows import Column
from train.dataset.prepared import SPLITS
from train.prepare.plan import Plan, partial_of, write_bytes
from train.prepare.reading import Rejected, documents_of
from train.prepare.scanning import digest_of, load_digests
from train.prepare.selection import REJECTED, TRAIN, VALIDATION, Decisions
from train.tokenizer.tokenizer import Encoder, load_tokenizer

_BATCH_BYTES = 2**20
_CODES = {"train": TRAIN, "validation": VALIDATION}


def open_encoder(work: Path) -> tuple[Encoder, int]:
    """The encoder of the preparation in `work`, and the rows that its tokens need."""
    tokenizer, eot_token = load_tokenizer(work / "tokenizer.json", 2**31)
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    eot = tokenizer.token_to_id(eot_token)
    assert eot is not None
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    return Encoder(tokenizer, eot, dtype), vocab_size


def kept_documents(
    plan: Plan, work: Path, number: int, decisions: Decisions, codes: tuple[int, ...]
) -> Iterator[tuple[int, str]]:
    """Decision and text of the documents of a unit with one of the decisions `codes`.

    Raises UserError if the unit has other documents than when it was scanned: a file that changes
    while it is read, or keeps its size and time, passes `check_inputs`, and streams are not in it.
    """
    unit, wanted = plan.units[number], decisions.of_unit(number)
    plan.check_inputs(unit)
    digests = map(bytes, load_digests(work, number))
    index = -1
    for index, document in enumerate(documents_of(unit, Column(plan.options.text_field))):
        if index >= len(wanted) or isinstance(document, Rejected) != (wanted[index] == REJECTED):
            break
        if isinstance(document, Rejected):
            continue
        if digest_of(document.encode()) != next(digests):
            break
        if wanted[index] in codes:
            yield int(wanted[index]), document
    else:
        if index + 1 == len(wanted):
            return
    raise UserError(
        f"{shown(unit.files[0])}: document {index + 1:,} of this part is not the one that was read "
        f"before; the source changed while it was prepared: remove {shown(work)} and start again"
    )


def encode(
    plan: Plan, work: Path, number: int, decisions: Decisions, encoder: Encoder
) -> dict[str, Any]:
    """Write the tokens of unit `number`; returns its counts."""
    folder = work / "encode"
    found: dict[str, Any] = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
    finished = {split: folder / f"{number}.{split}.tokens.bin" for split in SPLITS}
    partial = {split: partial_of(path) for split, path in finished.items()}
    lengths: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    with naming(folder):
        files = {split: open(path, "wb") for split, path in partial.items()}
        try:
            for split, texts in _batches(plan, work, number, decisions):
                stream = encoder.encode(texts)
                starts = np.flatnonzero(stream == encoder.eot)
                assert len(starts) == len(texts), "only boundaries are end-of-text tokens"
                files[split].write(stream.tobytes())
                lengths[split].append(np.diff(starts, append=len(stream)).astype(np.int32))
                found[split]["documents"] += len(texts)
                found[split]["tokens"] += len(stream)
                found[split]["bytes"] += sum(len(text.encode()) for text in texts)
        finally:
            for file in files.values():
                file.close()
        for split in SPLITS:
            partial[split].rename(finished[split])
            joined = np.concatenate([np.empty(0, np.int32), *lengths[split]])
            write_bytes(folder / f"{number}.{split}.lengths.bin", joined.tobytes())
    write_bytes(folder / f"{number}.json", json.dumps(found).encode())
    return found


def _batches(
    plan: Plan, work: Path, number: int, decisions: Decisions
) -> Iterator[tuple[str, list[str]]]:
    """The texts of a unit by split, about _BATCH_BYTES at a time."""
    split_of = {code: split for split, code in _CODES.items()}
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for code, text in kept_documents(plan, work, number, decisions, (TRAIN, VALIDATION)):
        split = split_of[code]
        texts[split].append(text)
        sizes[split] += len(text)
        if sizes[split] >= _BATCH_BYTES:
            yield split, texts[split]
            texts[split], sizes[split] = [], 0
    for split in SPLITS:
        if texts[split]:
            yield split, texts[split]
