"""Datasets on disk: Megatron's format byte by byte, shards, and every kind of damage."""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from train.dataset.megatron import MegatronWriter, is_megatron, open_megatron
from train.dataset.prepared import (
    FORMAT,
    INDEX,
    SplitWriter,
    fingerprint_of,
    open_prepared,
    verify,
)
from train.dataset.sequences import Concatenated, TokenRules
from train.dataset.tokens import BLOCK, DamagedData

N_TOKENS = 3 * BLOCK  # of two bytes: six blocks


def write_dataset(folder: Path, shard_bytes: int = 2 * BLOCK) -> np.ndarray:
    """A dataset of three shards and 1,000 documents; returns its training tokens."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 300, N_TOKENS).astype(np.uint16)
    starts = np.sort(rng.choice(np.arange(1, N_TOKENS), 999, replace=False))
    tokens[[0, *starts]] = 0
    lengths = np.diff([0, *starts, N_TOKENS])
    (folder / "tokenizer.json").write_text("{}")
    splits = {}
    for name, share in (("train", 1000), ("validation", 10)):
        writer = SplitWriter(folder, name, np.dtype(np.uint16), shard_bytes)
        for part in np.array_split(lengths[:share], 7):
            first = writer.n_tokens
            writer.add(tokens[first : first + part.sum()], part, 10)
        splits[name] = writer.close()
    index = {
        "format": FORMAT, "version": 1, "dtype": "uint16", "eot": 0, "vocab_size": 300,
        "tokenizer_sha256": hashlib.sha256(b"{}").hexdigest(), "splits": splits,
    }  # fmt: skip
    index["fingerprint"] = fingerprint_of(index)
    (folder / INDEX).write_text(json.dumps(index))
    return tokens


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize("shard_bytes", [BLOCK, 2 * BLOCK, 2**30])
def test_tokens_are_read_back_across_shards(tmp_path: Path, shard_bytes: int) -> None:
    tokens = write_dataset(tmp_path / "data", shard_bytes)
    split = open_prepared(tmp_path / "data").splits["train"]
    assert len(split.tokens) == len(tokens)
    assert (split.tokens.read(0, len(tokens)) == tokens).all()
    per_shard = shard_bytes // 2
    for start, stop in ((0, 1), (per_shard - 3, per_shard + 4), (N_TOKENS - 1, N_TOKENS), (5, 5)):
        assert (split.tokens.read(start, stop) == tokens[start:stop]).all()
    assert (tokens[split.offsets[:-1]] == 0).all() and len(split.offsets) == 1001
    assert verify(tmp_path / "data") > 2 * N_TOKENS


@pytest.mark.parametrize("offset", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK - 1])
def test_a_changed_byte_is_named_when_it_is_read_and_by_verify(dataset: Path, offset: int) -> None:
    file = dataset / "train-00001.bin"
    raw = bytearray(file.read_bytes())
    raw[offset] ^= 1
    file.write_bytes(raw)
    split = open_prepared(dataset).splits["train"]
    sequences = Concatenated(split, 128, TokenRules(0, True, 300))
    per_shard, start = BLOCK, offset // BLOCK * BLOCK
    inside = (per_shard + offset // 2) // 128
    with pytest.raises(DamagedData, match=rf"train-00001.bin: .* offsets {start:,} to") as caught:
        sequences.rows(np.array([inside]), np.array([0]))
    assert "\n" not in str(caught.value)
    other = 0 if offset else sequences.count - 1
    sequences.rows(np.array([other]), np.array([0]))  # what is sound can be read
    with pytest.raises(DamagedData, match=r"train-00001\.bin"):
        verify(dataset)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("train-00002.bin", "truncate", r"train-00002.bin: 65,536 bytes.*131,072.*offset 65,536"),
        ("train-00000.bin", "grow", "train-00000.bin: 131,073 bytes"),
        ("train-00001.bin", "remove", "train-00001.bin: No such file"),
        ("train.crc32.bin", "flip", r"train.crc32.bin: not the bytes that were written"),
        ("train.documents.bin", "remove", "train.documents.bin: missing"),
        ("tokenizer.json", "flip", "tokenizer.json: not the bytes"),
        (INDEX, "flip", INDEX),
        (INDEX, "truncate", "index.json: not valid JSON"),
        (INDEX, "remove", "index.json: No such file"),
    ],
)
def test_a_damaged_file_is_named(dataset: Path, name: str, change: str, expected: str) -> None:
    file = dataset / name
    raw = bytearray(file.read_bytes())
    if change == "truncate":
        raw = raw[: len(raw) // 2]
    elif change == "grow":
        raw.append(0)
    elif change == "flip":
        raw[len(raw) // 2] ^= 1
    file.unlink()
    if change != "remove":
        file.write_bytes(raw)
    with pytest.raises(UserError, match=expected) as caught:
        open_prepared(dataset)
    assert "\n" not in str(caught.value)


def test_damaged_boundaries_are_found_when_they_are_needed(dataset: Path) -> None:
    file = dataset / "train.documents.bin"
    raw = bytearray(file.read_bytes())
    raw[80] ^= 1
    file.write_bytes(raw)
    split = open_prepared(dataset).splits["train"]
    with pytest.raises(DamagedData, match=r"train.documents.bin: not the bytes"):
        _ = split.offsets


def test_an_id_outside_of_the_vocabulary_is_named_with_its_place(dataset: Path) -> None:
    split = open_prepared(dataset).splits["train"]
    tokens = split.tokens.read(0, N_TOKENS)
    place = int(np.flatnonzero(tokens >= 290)[-1])
    sequences = Concatenated(split, 16, TokenRules(0, True, 290))
    number = min(place // 16, sequences.count - 1)
    with pytest.raises(UserError, match=r"train-\d+.bin: byte offset [\d,]+: token id 29\d"):
        sequences.rows(np.array([number]), np.array([0]))


def test_megatron_files_are_those_of_its_documentation(tmp_path: Path) -> None:
    """Header, lengths, pointers and documents written here by hand."""
    documents = [[1, 2, 3, 9], [4, 9], [5, 6, 9]]
    flat = [t for d in documents for t in d]
    lengths = [len(d) for d in documents]
    for code, dtype in ((8, "<u2"), (4, "<i4"), (5, "<i8"), (1, "<u1")):
        size = np.dtype(dtype).itemsize
        (tmp_path / "x.bin").write_bytes(np.array(flat, dtype).tobytes())
        (tmp_path / "x.idx").write_bytes(
            b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 3, 4)
            + struct.pack("<3i", *lengths) + struct.pack("<3q", 0, 4 * size, 6 * size)
            + struct.pack("<4q", 0, 1, 2, 3)
        )  # fmt: skip
        assert is_megatron(tmp_path / "x") and is_megatron(tmp_path / "x.bin")
        split = open_megatron(tmp_path / "x").splits["train"]
        assert split.tokens.read(0, 9).tolist() == flat
        assert split.offsets.tolist() == [0, 4, 6, 9]
    # what we write is the same, from documents that begin with the end of text
    writer = MegatronWriter(tmp_path / "y", np.dtype(np.uint32))
    writer.add(np.array([9, 1, 2, 3, 9, 4]), np.array([4, 2]))
    writer.add(np.array([9, 5, 6]), np.array([3]))
    writer.close()
    (tmp_path / "x.bin").write_bytes(np.array(flat, "<i4").tobytes())
    (tmp_path / "x.idx").write_bytes(
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ3i3q4q", 1, 4, 3, 4, *lengths, 0, 16, 24, 0, 1, 2, 3)
    )
    for end in ("bin", "idx"):
        assert (tmp_path / f"y.{end}").read_bytes() == (tmp_path / f"x.{end}").read_bytes()


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        (0, b"X", "not an index of Megatron"),
        (9, b"\x02", "version 2"),
        (17, b"\x07", "dtype 7"),
        (18, b"\x63", "ends at byte offset"),
        (34, b"\xff\xff\xff\xff", "sequence 0 is negative"),
        (42, b"\x01", "byte offset 42: sequence 0 does not follow"),
        (58, b"\x02", "document bounds"),
    ],
)
def test_a_damaged_index_of_megatron_is_named(
    tmp_path: Path, place: int, value: bytes, expected: str
) -> None:
    writer = MegatronWriter(tmp_path / "x", np.dtype(np.uint16))
    writer.add(np.array([9, 1, 2, 9, 4]), np.array([3, 2]))
    writer.close()
    raw = bytearray((tmp_path / "x.idx").read_bytes())
    raw[place : place + len(value)] = value
    (tmp_path / "x.idx").write_bytes(raw)
    with pytest.raises(UserError, match=expected):
        open_megatron(tmp_path / "x")


def test_a_truncated_file_of_megatron_is_named(tmp_path: Path) -> None:
    writer = MegatronWriter(tmp_path / "x", np.dtype(np.uint16))
    writer.add(np.array([9, 1, 2, 9, 4]), np.array([3, 2]))
    writer.close()
    (tmp_path / "x.bin").write_bytes((tmp_path / "x.bin").read_bytes()[:-1])
    with pytest.raises(DamagedData, match=r"x.bin: 9 bytes, 10 were written"):
        open_megatron(tmp_path / "x")
