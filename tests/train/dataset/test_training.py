"""Training on blends: resumes, other ranks, validation, and what is refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runs import TINY, run
from tests.train.in_process import train
from train.prepare import statistics
from train.prepare.pipeline import Output, prepare_data
from train.prepare.plan import Options
from train.report.metrics import read_lines

TIMES = {"tokens_per_s", "step_s", "data_share", "memory_gib"}


@pytest.fixture(autouse=True, scope="module")
def _no_pictures() -> Iterator[None]:
    """Drawing takes half a second; tests/train/prepare has the picture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "draw_lengths", lambda *arguments: None)
        yield


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Two datasets with one tokenizer, and the first as Megatron's files."""
    folder = tmp_path_factory.mktemp("datasets")
    texts = [path.read_text() for path in sorted(corpus.glob("*.txt"))]
    rng = np.random.default_rng(0)
    others = ["".join(rng.permutation(list(text)))[:700] + "\n" for text in texts]
    for name, rows in (("web", texts), ("other", others)):
        lines = [json.dumps({"text": row}) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    for name in ("web", "other"):
        first = name == "web"
        options = Options(
            sources=(str(folder / f"{name}.jsonl"),), text_field="text", unreadable="refuse",
            tokenizer="" if first else str(folder / "web"), train_vocab=320 if first else 0,
            special_tokens=("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
            validation_fraction=0.1, near_duplicate_threshold=1.0,
        )  # fmt: skip
        prepare_data(options, Output(folder / name, megatron=first), lambda line: None)
    return folder


def blend(datasets: Path, *others: str, megatron: bool = False) -> list[str]:
    """The overrides of a blend, which replace the source of tests/tiny.toml."""
    first = datasets / "web" / "megatron" / "train" if megatron else datasets / "web"
    entries = [
        f'{{path = "{first}", weight = 0.7, name = "web"}}',
        f'{{path = "{datasets / "other"}", weight = 0.3, max_epochs = 40}}',
    ]
    return [
        "--data.source=stdlib", "--data.validation_fraction=0.02",
        f"--data.blend=[{', '.join(entries)}]",
        f"--data.cache_dir={datasets / 'cache'}", "--validation.sequences=4", *others,
    ]  # fmt: skip


def losses(folder: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if k not in TIMES}
        for line in read_lines(folder / "metrics.jsonl")
    ]


def final(folder: Path) -> dict[str, bytes]:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


@pytest.mark.parametrize(
    "more",
    [
        ["--data.packing=best_fit", "--data.fim_rate=0.5", "--data.workers=2"],
        pytest.param(["--data.workers=1"], marks=pytest.mark.slow),
        pytest.param(
            ["--data.workers=0", '--data.skip_steps=["3-4", "7"]'], marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_that_stops_continues_bit_for_bit(
    more: list[str], datasets: Path, tmp_path: Path
) -> None:
    words = blend(datasets, "--train.steps=6", "--schedule.steps=6", *more)
    assert train(*words, f"--run.dir={tmp_path / 'whole'}") == 0
    for steps in (2, 3, 6):  # two resumes, with other numbers of prefetched steps
        again = [*words, f"--train.steps={steps}", f"--data.prefetch={steps}"]
        assert train(*again, f"--run.dir={tmp_path / 'parts'}") == 0
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    keys = [k for k in whole[0] if not k.startswith("validation")]
    assert [{k: w.get(k) for k in keys} for w in whole] == [
        {k: p.get(k) for k in keys} for p in parts
    ]
    assert final(tmp_path / "whole") == final(tmp_path / "parts")
    last = whole[-1]
    skipped = 3 if "skip" in str(more) else 0
    assert last["data/web/tokens"] + last["data/other/tokens"] == pytest.approx(
        (6 + skipped) * 8 * 32, rel=0.05 if "best_fit" in str(more) else 0
    )
    assert last["loss/web"] != last["loss/other"]
    for name in ("web", "other"):
        perplexity = last[f"validation_perplexity/{name}"]
        assert np.log(perplexity) == pytest.approx(last[f"validation_loss/{name}"])
        assert last[f"validation_bits_per_byte/{name}"] > 0


@pytest.mark.long
def test_two_ranks_report_the_losses_of_one(datasets: Path, tmp_path: Path) -> None:
    words = blend(datasets, "--train.steps=2", "--validation.every=1", "--train.micro_batch=4")
    assert train(*words, f"--run.dir={tmp_path / 'one'}") == 0
    run("-m", "train", str(TINY), *words, f"--run.dir={tmp_path / 'two'}", ranks=2)
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        for key in one:
            if key.startswith(("loss", "validation", "data/")):
                assert two[key] == pytest.approx(one[key], rel=2e-5), key
        # the mean of the sources' losses is the loss
        tokens = {n: one[f"data/{n}/tokens"] for n in ("web", "other")}
        if one["step"] == 1:
            mean = sum(one[f"loss/{n}"] * t for n, t in tokens.items()) / sum(tokens.values())
            assert mean == pytest.approx(one["loss"], rel=1e-5)


def test_validation_leaves_training_as_it_is(datasets: Path, tmp_path: Path) -> None:
    words = blend(datasets, "--train.steps=3")
    for name, every in (("never", 0), ("always", 1)):
        assert train(*words, f"--run.dir={tmp_path / name}", f"--validation.every={every}") == 0
    loads = [(tmp_path / n / "expert_load.jsonl").read_bytes() for n in ("never", "always")]
    assert loads[0] == loads[1]
    assert final(tmp_path / "never") == final(tmp_path / "always")
    picked = [[line["loss"] for line in losses(tmp_path / n)] for n in ("never", "always")]
    assert picked[0] == picked[1]


def test_megatrons_files_are_read(datasets: Path, tmp_path: Path) -> None:
    words = blend(
        datasets, "--train.steps=2", f"--data.tokenizer={datasets / 'web'}", megatron=True
    )
    assert train(*words, f"--run.dir={tmp_path / 'run'}") == 0
    last = losses(tmp_path / "run")[-1]
    assert "validation_loss/other" in last and "validation_loss/web" not in last


@pytest.fixture
def started(datasets: Path, tmp_path: Path) -> Iterator[tuple[list[str], Path]]:
    """A run of two steps on copies of the datasets, and its arguments."""
    shutil.copytree(datasets, tmp_path / "copy")
    words = blend(tmp_path / "copy", "--train.steps=2", f"--run.dir={tmp_path / 'run'}")
    assert train(*words) == 0
    yield [*words, "--train.steps=4"], tmp_path / "copy"


def test_what_would_repeat_or_lose_samples_is_refused(
    started: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words, copy = started
    as_given = words[2]

    def refused(*more: str) -> str:
        capsys.readouterr()
        assert train(*words, *more) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    changed = as_given.replace("0.7", "0.2")
    error = refused(changed)
    assert "until step 2 the run has read 352 tokens of web" in error, error
    assert "would have read" in refused('--data.skip_steps=["1"]')
    only_one = f'--data.blend=[{{path = "{copy / "web"}", weight = 1.0, name = "web"}}]'
    assert "tokens of web" in refused(only_one)
    slightly = as_given.replace("0.7", "0.7001")  # the same number of tokens until now
    assert "some would be read twice and others never" in refused(slightly)
    entries = as_given.removeprefix("--data.blend=[").removesuffix("]").split("}, ")
    again = entries[0].replace('name = "web"', 'name = "again"')
    assert "add their weights" in refused(f"--data.blend=[{entries[0]}}}, {again}}}, {entries[1]}]")
    reordered = f"--data.blend=[{entries[1]}, {entries[0]}}}]"  # has read the same
    assert train(*words, reordered, "--train.steps=2") == 0
    assert "data.packing" in refused("--data.packing=best_fit")
    assert "data.fim_rate" in refused("--data.fim_rate=0.1")
    # what concerns later steps only is allowed
    later = as_given.replace('name = "web"', 'name = "web", changes = [{step = 3, weight = 0.1}]')
    assert train(*words[:-1], later, '--data.skip_steps=["4"]', "--train.steps=3") == 0


DAMAGES = {
    "byte": "other/train-00000.bin: the bytes at offsets 0 to",
    "truncated": "other/train-00000.bin: ",
    "other data": "a dataset must not change",
    "tokenizer": "made with another tokenizer",
}


def test_data_that_changed_between_two_attempts_is_named(
    started: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words, copy = started
    whole = copy.with_name("whole")
    shutil.copytree(copy / "other", whole)
    for damage, expected in DAMAGES.items():
        shutil.rmtree(copy / "other")
        if damage in ("byte", "truncated"):
            shutil.copytree(whole, copy / "other")
            file = copy / "other" / "train-00000.bin"
            raw = bytearray(file.read_bytes())
            raw[len(raw) // 3] ^= 4
            file.write_bytes(raw if damage == "byte" else raw[:-2])
        else:
            trains = damage == "tokenizer"
            options = Options(
                sources=(str(copy / "web.jsonl"),), text_field="text", unreadable="refuse",
                tokenizer="" if trains else str(copy / "web"), train_vocab=300 if trains else 0,
                special_tokens=(), validation_fraction=0.3, near_duplicate_threshold=1.0,
            )  # fmt: skip
            prepare_data(options, Output(copy / "other"), lambda line: None)
        capsys.readouterr()
        assert train(*words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and expected in error, error


@pytest.mark.parametrize("megatron", [False, True])
def test_a_dataset_under_two_names_is_refused(
    megatron: bool, datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The order of a source depends on its tokens, not its name: both would read the same."""
    words = blend(datasets, megatron=megatron)
    again = (
        f"{datasets}/web/megatron/train.idx" if megatron else f"{datasets}/../{datasets.name}/web"
    )
    twice = words[2].removesuffix("]") + f', {{path = "{again}", weight = 1, name = "again"}}]'
    assert train(*words, twice, f"--run.dir={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "are the same dataset" in error, error


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--data.fim_rate=0.5", '--data.fim_tokens=["a", "<nope>", "<|fim_middle|>"]'], "<nope>"),
        (["--train.steps=100000"], "no source is left"),
        ([], "max_epochs = 0.0001 of web is less than one of its"),
        (["--data.seq_len=100000"], "not one sequence"),
        (["--model.vocab_size=300"], "set model.vocab_size to 320"),
        (["--data.source=docs"], "data.source"),
        (["--data.text_field=body"], "data.text_field"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    more: list[str], expected: str, datasets: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    epochs = 1e-4 if "max_epochs" in expected else 2
    limited = blend(datasets)[2].replace("weight = 0.7", f"weight = 0.7, max_epochs = {epochs}")
    assert train(*blend(datasets), limited, f"--run.dir={tmp_path / 'run'}", *more) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and expected in error, error
