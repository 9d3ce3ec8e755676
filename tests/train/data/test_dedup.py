"""Near-duplicates against the Jaccard similarity computed by plain loops."""

import random

import numpy as np
import pytest

from train.data import progress
from train.data.dedup import HASHES, SHORTEST_LINE, band_rows, find_duplicates, signature


def lines_of(text: str) -> set[str]:
    return {line.strip() for line in text.split("\n") if len(line.strip()) >= SHORTEST_LINE}


def jaccard(a: str, b: str) -> float:
    first, second = lines_of(a), lines_of(b)
    shared = sum(1 for line in first if line in second)
    return shared / (len(first) + len(second) - shared)


def relative(text: str, changes: int, rng: random.Random) -> str:
    """`text` with some lines replaced and all of them indented and reordered."""
    lines = text.split("\n")
    for i in rng.sample(range(len(lines)), changes):
        lines[i] = f"replaced line {rng.random()}"
    rng.shuffle(lines)
    return "\n".join("    " + line for line in lines)


def document(rng: random.Random, lines: int = 100) -> str:
    return "\n".join(f"line {rng.random()}" for _ in range(lines))


def estimate(a: str, b: str) -> float:
    first, second = signature(a.encode()), signature(b.encode())
    assert first is not None and second is not None
    return float(np.mean(first == second))


def test_estimate_has_the_error_that_the_lesson_states() -> None:
    rng = random.Random(0)
    scores = []
    for changes in list(range(2, 80, 3)) * 6:
        text = document(rng)
        other = relative(text, changes, rng)
        exact = jaccard(text, other)
        scores.append((estimate(text, other) - exact) / (exact * (1 - exact) / HASHES) ** 0.5)
    # In units of the standard error: mean 0, deviation 1, for 156 pairs that have nothing in
    # common.
    assert abs(np.mean(scores)) < 4 / len(scores) ** 0.5
    assert 0.8 < np.std(scores) < 1.2
    assert max(map(abs, scores)) < 5


def clear(exact: float, threshold: float) -> bool:
    """Whether the estimate of a pair is on the right side of the threshold, within five standard
    errors."""
    return abs(exact - threshold) > 5 * (exact * (1 - exact) / HASHES) ** 0.5


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95])
def test_survey_keeps_what_plain_loops_keep(threshold: float) -> None:
    rng = random.Random(1)
    texts: list[str] = []
    for _ in range(15):
        family = [document(rng)]
        for changes in (0, 1, 6, 20, 45, 70, 95):
            other = relative(family[0], changes, rng)
            if all(clear(jaccard(other, text), threshold) for text in family):
                family.append(other)
        texts += family
    found = find_duplicates(texts, threshold)
    everything = find_duplicates(texts, 1.0)
    expected: list[int] = []
    for i in everything.kept:  # content-hash order
        if all(jaccard(texts[i], texts[j]) < threshold for j in expected):
            expected.append(i)
    assert found.kept == expected
    assert found.n_near == len(texts) - len(expected) >= 15
    assert len(everything.kept) == len(texts)


def test_survey_does_not_depend_on_the_order_of_reading() -> None:
    rng = random.Random(2)
    texts = [document(rng, 30) for _ in range(20)]
    texts += [relative(text, 1, rng) for text in texts[:10]] + texts[:5] + ["", " \n\t"]
    first = find_duplicates(texts, 0.8)
    assert (first.n_empty, first.n_exact, first.n_near) == (2, 5, 10)
    shuffled = texts[:]
    rng.shuffle(shuffled)
    second = find_duplicates(shuffled, 0.8)
    assert first.digests == second.digests == sorted(first.digests)
    assert [texts[i] for i in first.kept] == [shuffled[i] for i in second.kept]
    assert first.sizes == [len(texts[i].encode()) for i in first.kept]


def sharing(kind: str, count: int) -> list[str]:
    """Documents that share lines but are no near-duplicates at 0.8."""
    rng = random.Random(3)
    common = [f"a line of the template {i}" for i in range(200)]

    def made() -> list[str]:
        if kind == "licence":
            return common[:12] + [f"own {rng.random()}" for _ in range(12)]
        if kind == "long licence":  # J = 0.53 for every pair
            return common[:70] + [f"own {rng.random()}" for _ in range(30)]
        if kind == "licences":
            first = rng.randrange(4) * 30
            return common[first : first + 20] + [f"own {rng.random()}" for _ in range(15)]
        if kind == "form":  # each line is one of a few
            return rng.sample(common[:60], 25)
        assert kind == "one line"
        return [common[0]] + [f"own {rng.random()}" for _ in range(3)]

    return ["\n".join(made()) for _ in range(count)]


@pytest.mark.parametrize(
    ("kind", "n"),
    [("licence", 125), ("long licence", 125), ("licences", 125), ("form", 500), ("one line", 125)],
)
def test_comparisons_do_not_grow_with_shared_lines(kind: str, n: int) -> None:
    few, many = (find_duplicates(sharing(kind, count), 0.8) for count in (n, 8 * n))
    assert many.n_near <= 4 * (n / 500) ** 2  # of up to 8 million pairs whose estimate may err
    # per document; comparing every pair would take 8 times as many for 8 times the documents
    assert many.n_compared / (8 * n) < 4 * max(few.n_compared / n, 20)
    assert many.n_compared < (8 * n) ** 2 / 20


def kept_by_loops(table: np.ndarray, order: list[int], threshold: float) -> list[int]:
    """Compares every pair of signatures."""
    kept, chosen = np.empty_like(table), list[int]()
    for i in order:
        if not (np.mean(kept[: len(chosen)] == table[i], axis=1) >= threshold).any():
            kept[len(chosen)] = table[i]
            chosen.append(i)
    return chosen


@pytest.mark.parametrize("kind", ["licence", "long licence", "form"])
def test_near_duplicates_among_documents_that_share_lines(kind: str) -> None:
    rng = random.Random(4)
    base = sharing(kind, 500)
    planted = [text + f"\none more line {rng.random()}" for text in base[:220]]
    texts = base + planted
    found = find_duplicates(texts, 0.8)
    table = np.array([signature(text.encode()) for text in texts])
    assert found.kept == kept_by_loops(table, find_duplicates(texts, 1.0).kept, 0.8)
    assert found.n_near >= 220


def test_a_family_is_compared_with_the_one_that_stays() -> None:
    common = [f"a line of the template {i}" for i in range(60)]
    texts = ["\n".join([*common, f"number {i} of many"]) for i in range(1000)]
    found = find_duplicates(texts, 0.8)
    assert len(found.kept) == 1 and found.n_compared == 999
    short = find_duplicates([f"a\nb\n{i}" for i in range(1000)], 0.8)
    assert len(short.kept) == 1000 and short.n_compared == 0


@pytest.fixture(scope="module")
def licences() -> tuple[list[str], np.ndarray, list[int]]:
    """Documents, their signatures, and their order by content hash."""
    texts = sharing("licences", 1000)
    table = np.array([signature(text.encode()) for text in texts])
    return texts, table, find_duplicates(texts, 1.0).kept


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.35, 0.5, 0.65])
def test_every_threshold_divides_crowded_buckets(
    threshold: float, licences: tuple[list[str], np.ndarray, list[int]]
) -> None:
    texts, table, order = licences
    expected = kept_by_loops(table, order, threshold)
    # with a group at the threshold itself, one pair in a thousand may be missed
    assert len(set(find_duplicates(texts, threshold).kept) ^ set(expected)) <= 10


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", -1.0)
    lines: list[str] = []
    find_duplicates(sharing("one line", 2), 0.8, lines.append)
    assert lines == [
        "duplicates: 0 documents read so far",
        "duplicates: 1 documents read so far",
        "duplicates: 0 of 2 documents compared, 0 kept",
        "duplicates: 1 of 2 documents compared, 1 kept",
    ]


def test_short_lines_count_for_nothing() -> None:
    assert signature(b"if a:\n  b\n\n)") is None
    short = ["a\nb\n", "a\nb\nc\n", "a\nb\nc\n"]
    assert find_duplicates(short, 0.5).n_near == 0
    assert find_duplicates(short, 0.5).n_exact == 1
    padded = "a = 1\n}\n".join(f"a long line {i}\n" for i in range(30))
    assert estimate(padded, padded.replace("}", "{")) == 1.0


def test_a_document_longer_than_one_chunk() -> None:
    text = "\n".join(f"line number {i}" for i in range(10_000))
    half = "\n".join(f"line number {i}" for i in range(5_000))
    assert abs(estimate(text, half) - 0.5) < 5 * 0.044


def test_bands_rarely_overlook_a_pair_at_the_threshold() -> None:
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 0.99):
        rows = band_rows(threshold)
        assert HASHES % rows == 0
        assert (1 - threshold**rows) ** (HASHES / rows) <= 1e-4
    assert band_rows(0.8) == 4
    assert band_rows(0.0) == 1
