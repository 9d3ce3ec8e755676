"""Sequences of documents, packed and concatenated, compared with a reading of their documents."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from kernels.layers.cross_entropy import IGNORE
from train.dataset.best_fit import pack, read, store
from train.dataset.fill_in_middle import FillInMiddle
from train.dataset.prepared import Split
from train.dataset.sequences import Concatenated, Packed, Sequences, TokenRules
from train.dataset.tokens import ArrayTokens

EOT = 0


def split_of(documents: list[list[int]]) -> Split:
    tokens = np.array([t for document in documents for t in document], np.uint32)
    offsets = np.cumsum([0, *map(len, documents)]).astype(np.int64)
    return Split(ArrayTokens(tokens, "array"), 0, lambda: offsets)


def documents_of(seed: int, count: int = 200, longest: int = 60) -> list[list[int]]:
    """Documents that begin with EOT, with tokens that are nowhere else."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(0.08, count), longest)
    ends = np.cumsum(lengths)
    return [[EOT, *range(e - n + 1, e + 1)] for e, n in zip(ends.tolist(), lengths.tolist(),
                                                            strict=True)]  # fmt: skip


def pairs(sequences: Sequences) -> tuple[list[tuple[int, int]], list[int]]:
    """(token, target) of all tokens with a target, and all tokens, in one epoch."""
    numbers = np.arange(sequences.count)
    rows = sequences.rows(numbers, np.zeros_like(numbers))
    has = rows.targets_BL != IGNORE
    assert (rows.positions_BL[:, 0] == 0).all()
    steps = np.diff(rows.positions_BL, axis=1)
    assert ((steps == 1) | (rows.positions_BL[:, 1:] == 0)).all()
    # a document begins where a position is 0, and only there
    assert ((rows.tokens_BL == EOT) <= ((rows.positions_BL == 0) | ~has)).all()
    found = zip(rows.tokens_BL[has].tolist(), rows.targets_BL[has].tolist(), strict=True)
    return list(found), rows.tokens_BL.reshape(-1).tolist()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("seq_len", [2, 7, 16, 61, 500])
def test_every_token_is_packed_once_with_its_target(seed: int, seq_len: int) -> None:
    documents = documents_of(seed)
    split = split_of(documents)
    packing = pack(split.offsets, seq_len)
    rules = TokenRules(EOT, True, 2**32)
    expected = [(t, u) for d in documents for t, u in zip(d, [*d[1:], EOT], strict=True)]
    assert sorted(pairs(Packed(split, packing, rules))[0]) == sorted(expected)
    assert packing.n_tokens == len(expected)
    assert packing.n_cuts == sum((len(d) - 1) // seq_len for d in documents)
    if seq_len > 60:
        assert packing.n_cuts == 0 and packing.n_cuts_concatenated > 0


def test_concatenated_sequences_are_the_row_of_tokens() -> None:
    documents = documents_of(1)
    sequences = Concatenated(split_of(documents), 16, TokenRules(EOT, True, 2**32))
    row = [t for d in documents for t in d]
    found, tokens = pairs(sequences)
    assert tokens == row[: len(tokens)]
    assert found == list(pairwise(row))[: len(tokens)]


def test_packing_leaves_little_padding() -> None:
    """Of documents of 5 to 2,000 tokens, in sequences of 2,048."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5.5, 1.0, 20_000).astype(int) + 5, 2000)
    packing = pack(np.cumsum([0, *lengths]), 2048)
    assert packing.padding < 0.002
    assert packing.n_cuts == 0
    # no sequence that is half empty could take in another: at most one is
    used = np.add.reduceat(packing.lengths, packing.bounds[:-1])
    assert (used <= 2048).all() and (used < 1024).sum() <= 1


@pytest.mark.parametrize(("median", "spread"), [(245, 0.9), (913, 1.5), (6000, 1.2)])
def test_only_documents_longer_than_a_sequence_are_cut_and_as_rarely_as_possible(
    median: int, spread: float
) -> None:
    """Also where most documents are longer: none of their cuts can be avoided."""
    rng = np.random.default_rng(1)
    lengths = rng.lognormal(np.log(median), spread, 5_000).astype(int) + 5
    offsets = np.cumsum([0, *lengths])
    packing = pack(offsets, 2048)
    ends = packing.starts + packing.lengths
    cut = ~np.isin(ends, offsets)  # a piece that ends within its document
    document = np.searchsorted(offsets, packing.starts[cut], side="right") - 1
    cuts = np.bincount(document, minlength=len(lengths))
    assert (cuts == -(-lengths // 2048) - 1).all() and cuts.sum() == packing.n_cuts > 0
    inside = offsets[1:-1]
    concatenated = (offsets[-1] - 1) // 2048 - len(np.unique(inside[inside % 2048 == 0]))
    assert packing.n_cuts_concatenated == concatenated > packing.n_cuts
    assert packing.padding < 0.003


def test_a_packing_is_stored_and_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "packing"
    offsets = split_of(documents_of(2)).offsets
    store(folder, 16, offsets)
    again, direct = read(folder), pack(offsets, 16)
    for name in ("starts", "lengths", "bounds"):
        assert (getattr(again, name) == getattr(direct, name)).all()
    assert again.n_cuts == direct.n_cuts and again.padding == direct.padding


def test_documents_without_end_of_text_have_no_target_across_their_end() -> None:
    """As in Megatron's files, with and without an end-of-text token at the end."""
    documents = [[5, 6, 7], [8, 9, EOT], [10], [11, 12, 13, 14, 15, 16]]
    split = split_of(documents)
    rules = TokenRules(EOT, False, 2**32)
    rows = Concatenated(split, 6, rules).rows(np.array([0, 1]), np.zeros(2, int))
    assert rows.positions_BL.tolist() == [[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4]]
    assert rows.targets_BL.tolist() == [[6, 7, -1, 9, 0, -1], [-1, 12, 13, 14, 15, 16]]
    packed = Packed(split, pack(split.offsets, 6), rules)
    rows = packed.rows(np.arange(packed.count), np.zeros(packed.count, int))
    has = rows.targets_BL != IGNORE
    found = set(zip(rows.tokens_BL[has].tolist(), rows.targets_BL[has].tolist(), strict=True))
    assert found == {(t, u) for d in documents for t, u in pairwise(d)}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_exactly_the_rate_of_documents_is_filled_in_the_middle(packed: bool, rate: float) -> None:
    documents = documents_of(3, count=80)
    split, rules = split_of(documents), TokenRules(EOT, True, 2**32)
    prefix, suffix, middle = 10**6, 10**6 + 1, 10**6 + 2
    fim = FillInMiddle(rate, (prefix, suffix, middle), EOT, 80, seed=1, name="x")
    for epoch in (0, 1):
        assert fim.chosen(np.arange(80), epoch).sum() == round(rate * 80)
    sequences: Sequences = Concatenated(split, 500, rules, fim)
    if packed:
        sequences = Packed(split, pack(split.offsets, 100), rules, fim)
    numbers = np.arange(sequences.count)
    rows = sequences.rows(numbers, np.zeros_like(numbers))
    rearranged = 0
    for tokens, targets, positions in zip(rows.tokens_BL, rows.targets_BL, rows.positions_BL,
                                          strict=True):  # fmt: skip
        bounds = [*np.flatnonzero(positions == 0).tolist(), len(tokens)]
        for start, end in pairwise(bounds):
            part = tokens[start:end].tolist()
            if prefix not in part:
                continue
            rearranged += 1
            head = int(part[0] == EOT)  # 0 for the rest of a document
            assert part[head] == prefix and targets[end - 1] in (EOT, IGNORE)
            assert head or not packed
            assert targets[start : end - 1].tolist() == part[1:]
            a, b = part.index(suffix), part.index(middle)
            body = part[head + 1 : a] + part[b + 1 :] + part[a + 1 : b]
            assert body == list(range(body[0], body[0] + len(body)))  # as documents are
            assert len(part) == len(body) + head + 3
    if packed:  # every document is whole
        long_enough = [len(d) - 1 >= 8 for d in documents]
        chosen = fim.chosen(np.arange(80), 0)
        assert rearranged == (chosen & long_enough).sum()
    else:
        assert rearranged > 0
