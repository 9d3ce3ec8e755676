"""Streams of Hugging Face datasets, from local files: order, exact resumes, what is refused."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from configs.errors import UserError
from tests.train.in_process import train
from train.data import hf_stream, streaming
from train.data.hf_stream import StreamedDocuments, open_rows
from train.data.streaming import BLOCK, BlockShuffle, DocumentStream, StreamedSequences
from train.report.metrics import read_lines
from train.tokenizer.tokenizer import EOT, Encoder

L = 4


def say_nothing(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of 400 rows, of one to 60 words that are numbers; some without text."""
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    for name in range(3):
        lines = []
        for row in range(400):
            words = " ".join(map(str, rng.integers(0, 10, rng.integers(1, 60))))
            lines.append(json.dumps({"text": None if row % 97 == 5 else words, "id": row}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel({EOT: 0} | {str(i): i + 1 for i in range(10)}, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([EOT])
    return made


def opened(folder: Path, *, held_out: bool = False) -> StreamedSequences:
    documents = StreamedDocuments(f"stream:{folder}", "text", say_nothing)
    encoder = Encoder(tokenizer(), 0, np.dtype(np.uint32))
    return StreamedSequences(DocumentStream(documents, encoder, 0.1, held_out), L, ahead=50)


def expected_row(folder: Path, epochs: int) -> list[int]:
    """The tokens of a stream, read with the json module."""
    found: list[int] = []
    for _ in range(epochs):
        for file in sorted(folder.glob("*.jsonl")):
            for line in file.read_text().splitlines():
                text = json.loads(line)["text"]
                if text is not None and not is_held_out(text):
                    found += [0, *(int(word) + 1 for word in text.split())]
    return found


def is_held_out(text: str) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < 0.1 * 2**64


def read(sequences: StreamedSequences, first: int, end: int) -> np.ndarray:
    numbers = np.arange(first, end)
    return sequences.rows(numbers, np.zeros_like(numbers)).tokens_BL


def test_a_stream_is_its_documents_one_after_another_again_and_again(rows: Path) -> None:
    row = expected_row(rows, epochs=2)
    n = len(row) // L - 1
    sequences = opened(rows)
    found = [sequences.rows(np.arange(i, i + 64), np.zeros(64, int)) for i in range(0, n - 64, 64)]
    tokens = np.concatenate([part.tokens_BL.reshape(-1) for part in found])
    targets = np.concatenate([part.targets_BL.reshape(-1) for part in found])
    assert len(tokens) > len(row) // 2 + L  # into the second epoch
    assert tokens.tolist() == row[: len(tokens)]
    assert targets.tolist() == row[1 : len(targets) + 1]
    assert sequences.stream.documents.n_empty >= 15
    for part in found[:2]:
        starts = (part.tokens_BL == 0) | (np.arange(L) == 0)
        assert ((part.positions_BL == 0) == starts).all()


def test_a_stream_continues_exactly_where_a_block_begins(rows: Path) -> None:
    whole = opened(rows)
    expected = [read(whole, b * BLOCK, (b + 1) * BLOCK) for b in range(5)]
    for block in (0, 1, 4):
        state = json.loads(json.dumps(whole.state(block)))
        again = opened(rows)
        again.load(block, state)
        for later in range(block, 5):
            assert (read(again, later * BLOCK, (later + 1) * BLOCK) == expected[later]).all()
        assert again.state(5) == whole.state(5)
        assert again.stream.documents.n_empty == whole.stream.documents.n_empty


def test_documents_continue_at_any_row(rows: Path) -> None:
    documents = StreamedDocuments(f"stream:{rows}", "text", say_nothing)
    again = StreamedDocuments(f"stream:{rows}", "text", say_nothing)
    texts, states = [], {}
    for number in range(2400 - 40):  # two epochs, without rows that have no text
        if number % 397 == 0 or documents.number in (1199, 1200, 1201, 1264):
            states[number] = json.loads(json.dumps(documents.state()))
        texts.append(documents.next())
    assert len(states) > 8
    for number, state in states.items():
        again.load(state)
        assert [again.next() for _ in range(3)] == texts[number : number + 3]


def test_blocks_are_shuffled_and_complete() -> None:
    order = BlockShuffle(L, seed=3)
    found = order.at(np.arange(2 * BLOCK)).numbers
    for block in (0, 1):
        part = found[block * BLOCK : (block + 1) * BLOCK]
        assert (np.sort(part) == np.arange(block * BLOCK, (block + 1) * BLOCK)).all()
        assert not (part[1:] == part[:-1] + 1).all()
    assert (order.at(np.array([5, BLOCK + 5])).numbers == found[[5, BLOCK + 5]]).all()


def test_what_changed_since_the_checkpoint_is_named(rows: Path, tmp_path: Path) -> None:
    whole = opened(rows)
    read(whole, 0, 2 * BLOCK)
    state = whole.state(2)
    other = tmp_path / "other"
    shutil.copytree(rows, other)
    for file in other.glob("*.jsonl"):
        file.write_text(file.read_text().replace('"text": "', '"text": "9 '))
    with pytest.raises(UserError, match=r"row [\d,]+ is not the one that the checkpoint has read"):
        opened(other).load(2, state)
    with pytest.raises(UserError, match="not the state of a stream"):
        whole.load(2, {"used": 1})


def test_rows_that_are_no_text_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    for content, expected in (
        ('{"text": "a"}\n{"text": "b"}\n', ""),
        ('{"body": "a"}\n', "row 1: no column 'text'; it has body"),
        ('{"text": 7}\n', "row 1: the column 'text' holds int, not text"),
        ('{"text": "a"}\n{"text": "b\n', "cannot be"),
        ("", "cannot be streamed|no rows|cannot be read"),
        ('{"text": null}\n{"text": " "}\n', "no row has text"),
    ):
        (tmp_path / "x.jsonl").write_text(content)
        try:
            documents = StreamedDocuments(f"stream:{tmp_path / 'x.jsonl'}", "text", lines.append)
            found = [documents.next() for _ in range(3)]
            assert found == ["a", "b", "a"] and documents.epoch == 1 and not expected
        except UserError as error:
            assert expected, error
            with pytest.raises(UserError, match=expected):
                raise error
            assert "\n" not in str(error) and "x.jsonl" in str(error)
    assert any("1 rows without text" in line for line in lines)
    with pytest.raises(UserError, match="no such file or folder"):
        open_rows("stream:./nothing")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'datasets>="):
        open_rows(f"stream:{tmp_path}")


def words_of(tmp_path: Path, rows: Path) -> list[str]:
    folder = tmp_path / "tokenizer"
    folder.mkdir(exist_ok=True)
    tokenizer().save(str(folder / "tokenizer.json"))
    return [
        f"--data.source=stream:{rows}", f"--data.tokenizer={folder}",
        "--data.validation_fraction=0.1", f"--data.cache_dir={tmp_path / 'cache'}",
        "--validation.sequences=8", "--schedule.steps=9",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_on_a_stream_stops_and_continues_bit_for_bit(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(streaming, "BLOCK", 24)  # of three steps
    words = [*words_of(tmp_path, rows), '--data.skip_steps=["4-6"]']
    assert train(*words, "--train.steps=9", f"--run.dir={tmp_path / 'whole'}") == 0
    for steps, workers in ((2, 0), (3, 1), (9, 1)):
        more = [f"--train.steps={steps}", f"--data.workers={workers}"]
        assert train(*words, *more, f"--run.dir={tmp_path / 'parts'}") == 0
    losses = [
        [(line["loss"], line.get("validation_loss")) for line in
         read_lines(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "parts")
    ]  # fmt: skip
    assert [loss for loss, _ in losses[0]] == [loss for loss, _ in losses[1]]
    assert losses[0][-1] == losses[1][-1]
    assert "rows without text" in capsys.readouterr().out
    more = ["--train.steps=9", "--data.workers=2", f"--run.dir={tmp_path / 'other'}"]
    assert train(*words, *more) == 2
    assert "data.workers" in capsys.readouterr().err
    assert hf_stream.is_stream("stream:x")
