"""Rows of data files: only the text column matters, and errors name what cannot be read."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import UserError
from configs.schema import DataConfig
from train.data import rows as subject
from train.data.documents import Documents
from train.data.sources import locate

BOM = b"\xef\xbb\xbf"


def read(source: Path, **settings: Any) -> Documents:
    return locate(DataConfig(source=str(source), **settings)).read()


def refusal(source: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(source, **settings)
    assert "\n" not in str(caught.value) and "data.source" in str(caught.value)
    return str(caught.value)


def not_utf8() -> pa.Array:
    """A string of two bytes that are not UTF-8, as other programs may write it."""
    ends = pa.py_buffer((0).to_bytes(4, "little") + (2).to_bytes(4, "little"))
    return pa.Array.from_buffers(pa.string(), 1, [None, ends, pa.py_buffer(b"a\xe9")])


OTHERS: list[dict[str, Any]] = [
    {"url": "x", "n": 1},
    {},
    {"n": "text", "deep": {"a": [1]}},
    {"n": None, "deep": 3, "when": "2020-01-01"},
    {"deep": {"a": "b"}, "when": 12, "": [], "n": 1.5},
    {"n": 10**5000, "deep": [[[]]], "when": "no date"},
]


def test_only_the_text_column_of_json_lines_decides(tmp_path: Path) -> None:
    for number, others in enumerate((OTHERS, OTHERS[::-1], OTHERS[3:] + OTHERS[:3])):
        lines = []
        for i, other in enumerate(others):
            text = {"text": f"{number} {i} é\u2028"} if i != 2 else {"text": None}
            digits = str(10**4000) + "0" * 1000  # more digits than Python converts
            line = json.dumps({k: v for k, v in (other | text).items() if v != 10**5000})
            lines.append(line[:-1] + f', "big": {digits}, "float": 1e999, "nan": NaN}}')
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines), "utf-8")
    expected = [f"{n} {i} é\u2028" if i != 2 else "" for n in range(3) for i in range(6)]
    assert list(read(tmp_path)) == expected


def test_only_the_text_column_of_parquet_decides(tmp_path: Path) -> None:
    kinds: dict[str, Any] = {
        "a": ["x"], "b": [1], "c": [{"text": "not this"}], "d": [None], "e": [[1]], "f": [b"\xff"]
    }  # fmt: skip
    for i, other in enumerate(kinds.values()):
        table = {"text": [f"document {i}"], "other": other, "text.x": [i], "texts": ["no"]}
        pq.write_table(pa.table(table), tmp_path / f"{i}.parquet")
    assert list(read(tmp_path)) == [f"document {i}" for i in range(6)]
    pq.write_table(pa.table({"a": [{"b": "nested"}], "a.b": ["dotted"]}), tmp_path / "0.parquet")
    assert list(read(tmp_path / "0.parquet", text_field="a.b")) == ["dotted"]


TEXT = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "wide dictionary": pa.dictionary(pa.int64(), pa.large_string()),
}


@pytest.mark.parametrize("name", TEXT)
def test_every_arrow_type_of_text(tmp_path: Path, name: str) -> None:
    texts = ["first", None, "é \U0001f600", "first", ""] * 100
    column = pa.array(texts, pa.string()).cast(TEXT[name])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=70)
    assert list(read(tmp_path / "a.parquet")) == [text or "" for text in texts]


def test_files_that_have_nothing_stand_beside_good_ones(tmp_path: Path) -> None:
    (tmp_path / "0.jsonl").touch()
    (tmp_path / "1.jsonl").write_bytes(BOM + b" \r\n\n")
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "3.jsonl").write_text('{"text": "a"}\n')
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "4.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.large_string())}), tmp_path / "5.parquet")
    pq.write_table(pa.table({"text": pa.nulls(2)}), tmp_path / "6.parquet")
    pq.write_table(pa.table({"other": pa.array([], pa.string())}), tmp_path / "7.parquet")
    pq.write_table(pa.table({"text": ["b"]}), tmp_path / "8.parquet")
    assert [text for text in read(tmp_path) if text] == ["a", "b"]
    assert list(read(tmp_path / "4.parquet")) == list(read(tmp_path / "0.jsonl")) == []


def test_a_file_without_the_column_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"txt": "x"}\n{}\n')
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "b.parquet")
    message = refusal(tmp_path)
    assert "no such column (data.text_field = 'text'); it has txt, body, n; did you mean" in message
    (tmp_path / "c.jsonl").write_text('{"text": "good"}\n')
    documents = read(tmp_path)
    assert [text for text in documents if text] == ["good"]
    assert [Path(note.split(" has no column")[0]).name for note in documents.notes] == [
        "a.jsonl", "b.parquet",
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "jsonlines", "ldjson", "JSONL"])
@pytest.mark.parametrize("gz", ["", ".gz", ".GZ"])
@pytest.mark.parametrize("alone", [True, False])
def test_every_name_of_json_lines(tmp_path: Path, suffix: str, gz: str, alone: bool) -> None:
    content = b'{"text": "one\\n\\ntwo"}\n{"text": "three"}\n'
    path = tmp_path / f"rows.{suffix}{gz}"
    path.write_bytes(gzip.compress(content) if gz else content)
    assert list(read(path if alone else tmp_path)) == ["one\n\ntwo", "three"]


def test_blank_lines_marks_and_line_ends(tmp_path: Path) -> None:
    a, b, c = (b'{"text": "%s"}' % letter for letter in (b"a", b"b", b"c"))
    contents = [
        BOM + a + b"\n" + b + b"\n" + c,
        b"\n\n" + a + b"\n \t\n" + b + b"\r\n\r\n" + c + b"\r\n\n\n",
        a + b"\n" + BOM + b + b"\n" + BOM + c,  # concatenated files
        BOM
        + BOM
        + a
        + b"\n"
        + BOM
        + b"\n"
        + BOM
        + b"  "
        + BOM
        + b
        + b"\r\n \t"
        + BOM
        + c
        + b"\n"
        + BOM,
    ]
    for number, content in enumerate(contents):
        for compress in (bytes, gzip.compress):
            path = tmp_path / f"{number}.jsonl{'.gz' if compress is gzip.compress else ''}"
            path.write_bytes(compress(content))
            assert list(read(path)) == ["a", "b", "c"]
    (tmp_path / "two.jsonl.gz").write_bytes(gzip.compress(a + b"\n") + gzip.compress(b) + bytes(9))
    assert list(read(tmp_path / "two.jsonl.gz")) == ["a", "b"]


GOOD = b'{"text": "good"}\n'
BAD_LINES = {
    "cut": (b'{"text": "cut of', "not JSON"),
    "no object": (b'["text"]', "a list, not an object"),
    "a string": (b'"text"', "a string, not an object"),
    "a number": (b'{"text": 3}', "'text' holds a number, not text"),
    "a huge number": (b'{"text": ' + b"9" * 9000 + b"}", "'text' holds a number"),
    "a list": (b'{"text": ["a"]}', "'text' holds a list"),
    "false": (b'{"text": false}', "'text' holds true or false"),
    "half a pair": (b'{"text": "a\\ud800b"}', "half of a surrogate pair (character 2)"),
    "latin-1": ('{"text": "caf\xe9"}'.encode("latin-1"), "not UTF-8 (byte 14)"),
    "latin-1 elsewhere": ('{"text": "a", "b": "\xe9"}'.encode("latin-1"), "not UTF-8"),
    "nested": (b'{"text": "a", "b": ' + b"[" * 100_000, "nested too deep"),
    "zeros": (bytes(50), "not JSON"),
    "long": (b'{"text": "' + b"a" * 20_000 + b'"}', "longer than 10,000 bytes"),
}


@pytest.mark.parametrize("name", BAD_LINES)
@pytest.mark.parametrize("last", [False, True])
def test_a_line_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, last: bool
) -> None:
    if name == "long":
        monkeypatch.setattr(subject, "LONGEST_LINE", 10_000)
    bad, why = BAD_LINES[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD + bad + (b"" if last else b"\n" + GOOD))
    message = refusal(path)
    assert "a.jsonl" in message and f"line 4: {why}" in message, message
    assert 'data.unreadable_rows = "skip"' in message
    documents = read(path, unreadable_rows="skip")
    assert list(documents) == ["good"] * (2 if last else 3)
    assert documents.n_unreadable_rows == 1
    assert documents.unreadable_rows[0].startswith(f"{path}, line 4: {why}")


def damaged_gz(kind: str) -> tuple[bytes, str]:
    raw = b"".join(b'{"text": "%d"}\n' % i for i in range(20_000))
    whole = gzip.compress(raw)
    if kind == "cut":
        return whole[: len(whole) // 2], "ended before the end"
    if kind == "flipped":
        return whole[:2000] + bytes(byte ^ 0x5A for byte in whole[2000:2100]) + whole[2100:], ""
    if kind == "checksum":
        return whole[:-8] + bytes(8), "CRC"
    if kind == "no gzip":
        return raw, "Not a gzipped file"
    return whole + b"something else behind", "Not a gzipped file"


@pytest.mark.parametrize("kind", ["cut", "flipped", "checksum", "no gzip", "tail"])
def test_a_damaged_gz(tmp_path: Path, kind: str) -> None:
    content, why = damaged_gz(kind)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(content)
    message = refusal(path)
    assert why in message and "a.jsonl.gz" in message and ": line " in message, message
    documents = read(path, unreadable_rows="skip")
    rows = list(documents)
    assert documents.n_unreadable_rows >= 1
    if kind not in ("flipped",):  # which may decode to something else before the damage is detected
        assert rows == [str(i) for i in range(len(rows))]
    assert len(rows) > 500 or kind == "no gzip"


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"document {i} " * 20 for i in range(2000)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=500, compression="snappy")
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[:-3000], b"x" * 100, whole[:-4] + b"PAR2"):
        path.write_bytes(content)
        assert "the whole file: not readable as Parquet" in refusal(path)
        assert read(path, unreadable_rows="skip").n_unreadable_rows == 1
    metadata = pq.ParquetFile(pa.BufferReader(whole)).metadata
    third = metadata.row_group(2).column(0)
    start = third.dictionary_page_offset or third.data_page_offset
    path.write_bytes(whole[: start + 1] + b"\xff" * 60 + whole[start + 61 :])
    message = refusal(path)
    assert "row " in message and "and all that follow" in message
    documents = read(path, unreadable_rows="skip")
    assert list(documents) == texts[: len(documents)] and len(documents) >= 900


def test_parquet_columns_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    kinds = {
        "int64": [1], "binary": [b"a"], "list<element: string>": [["a"]], "bool": [True],
        "struct<a: string>": [{"a": "b"}],
    }  # fmt: skip
    for kind, values in kinds.items():
        pq.write_table(pa.table({"text": values}), path)
        assert f"holds {kind}, not text (data.text_field = 'text')" in refusal(path)
    pq.write_table(pa.table([pa.array(["a"])] * 2, names=["text"] * 2), path)
    assert "there are two columns of this name (data.text_field = 'text')" in refusal(path)
    assert "two columns" in refusal(path, unreadable_rows="skip"), "nothing else is there"
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    assert f"{path}, there are two columns" in refusal(tmp_path)
    documents = read(tmp_path, unreadable_rows="skip")
    assert list(documents) == ["good"] and documents.n_unreadable_rows == 1
    assert documents.unreadable_rows[0].startswith(f"{path}, the whole file: there are two columns")


def test_files_that_are_not_utf8_are_left_out_whole(tmp_path: Path) -> None:
    latin = '{"text": "caf\xe9"}\n'.encode("latin-1")
    (tmp_path / "a.jsonl").write_bytes(GOOD + GOOD)
    (tmp_path / "b.jsonl").write_bytes(GOOD * 500 + latin + GOOD)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(latin))
    (tmp_path / "d.ndjson").write_bytes('{"text": "wide"}\n'.encode("utf-16"))
    mixed = pa.chunked_array([pa.array(["fine"]), not_utf8()])
    pq.write_table(pa.table({"text": mixed}), tmp_path / "e.parquet")
    (tmp_path / "f.txt").write_bytes(b"caf\xe9")
    (tmp_path / "g.jsonl").write_bytes(b'{"text": "last"}')
    documents = read(tmp_path)
    assert list(documents) == ["good", "good", "last"]
    assert [Path(name).name[0] for name in sorted(documents.not_utf8)] == list("bcdef")
    assert documents.take([2, 0]) == ["last", "good"]
    assert "row 2: not UTF-8" in refusal(tmp_path / "e.parquet")
    assert "line 501: not UTF-8" in refusal(tmp_path / "b.jsonl")
    documents = read(tmp_path, unreadable_rows="skip")  # row by row if rows are the unit
    assert list(documents) == ["good"] * 503 + ["fine", "last"]


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = open

    def refuse(path: Any, *rest: Any, **options: Any) -> Any:
        if str(path).endswith("b.jsonl"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **options)

    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    monkeypatch.setattr("builtins.open", refuse)
    assert "b.jsonl, the whole file: Permission denied" in refusal(tmp_path)
    assert list(read(tmp_path, unreadable_rows="skip")) == ["good"]
