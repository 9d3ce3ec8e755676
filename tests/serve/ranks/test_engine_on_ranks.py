"""`serve.Engine` and `python -m serve` on several ranks, as a user starts them."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from configs.errors import UserError
from configs.parallel_dims import ParallelDims, resolve_serving
from serve.__main__ import main
from tests import forks
from tests.forks import Program
from tests.parallel.mesh.meshes import model_of
from tests.runs import ROOT, environment, free_port, run
from tests.serve.ranks.conftest import write_lively

HERE = ROOT / "tests" / "serve" / "ranks"
needs_forks = pytest.mark.skipif(not forks.POSSIBLE, reason="Linux only")


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lively(tmp_path_factory.mktemp("served") / "tiny", model_of("qwen3"), 2048)


@pytest.mark.parametrize(
    ("family", "tp", "ep"),
    [("deepseek-v3", 2, 1), pytest.param("qwen3", 2, 2, marks=pytest.mark.slow),
     pytest.param("gpt-oss", 1, 2, marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_script(family: str, tp: int, ep: int, tmp_path: Path) -> None:
    """Generates the tokens of one process, also after new weights, and counts its experts;
    continues on rank 0 only."""
    model, other = model_of(family), model_of("mixtral")
    folders = [
        write_lively(tmp_path / name, m, 2048, seed)
        for name, m, seed in ((f"{family}-a", model, 0), ("b", model, 1), ("c", other, 0))
    ]
    found = []
    for ranks, degrees in ((1, (1, 1)), (2, (tp, ep))):
        out = tmp_path / f"{ranks}.json"
        done = run(HERE / "engine_run.py", *degrees, out, *folders, ranks=ranks)
        assert (done.stdout, done.stderr) == ("the script went on\n", ""), done
        found.append(json.loads(out.read_text()))
    assert found[0] == found[1]
    greedy, _, updated, kept = found[1]["tokens"]
    assert greedy[:3] != updated == kept
    assert min(map(sum, found[1]["counts"])) > 1500
    assert found[1]["refusal"].endswith("is another model than the one that is served")


@contextmanager
def server(export: Path, *options: str, ranks: int = 2) -> Iterator[tuple[Program, str]]:
    """A running server and its URL."""
    words = ["-m", "serve", str(export), "--port", "0", "--kv-tokens", "4096", *options]
    with Program(words, environment(), ranks=ranks) as program:
        deadline = time.monotonic() + 60
        while not (line := program.printed()[0]).endswith("\n"):
            assert program.is_running() and time.monotonic() < deadline, program.printed()
            time.sleep(0.02)
        assert line.startswith("serving tiny on http://") and "2 ranks: tp 2, ep 1; each" in line
        yield program, line.split()[3]


def ask(url: str, **more: object) -> list[int]:
    body = {"prompt": [1, 2, 3], "max_tokens": 6, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    answer = httpx.post(f"{url}/completions", json=body | more, timeout=60).json()
    tokens: list[int] = answer["choices"][0]["token_ids"]
    return tokens


@needs_forks
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_serves_and_stops(stop: signal.Signals, export: Path) -> None:
    """Every rank gets the signal, as from a terminal or a launcher."""
    with server(export, "--tp", "2") as (program, url):
        assert len(ask(url)) == 6
        if stop == signal.SIGINT:
            time.sleep(2.5)  # idle, the ranks look after each other
            assert ask(url) == ask(url)
        program.signal(stop)
        program.signal(stop)
        done = program.finish(20)
    assert done.returncode == 0 and not done.stderr, done
    assert done.stdout.count("\n") == 1


@needs_forks
@pytest.mark.long
@pytest.mark.parametrize(("lost", "busy"), [(1, False), (0, False), (1, True)])
def test_a_killed_rank_ends_the_others(lost: int, busy: bool, export: Path) -> None:
    with server(export, "--tp", "2") as (program, url), ExitStack() as open_answers:
        if busy:
            body = {"prompt": [1], "max_tokens": 2000, "ignore_eos": True, "stream": True}
            stream = httpx.stream("POST", f"{url}/completions", json=body, timeout=60)
            next(open_answers.enter_context(stream).iter_lines())
        subprocess.run(["kill", "-KILL", str(program.pids[lost])], check=True)
        begin = time.monotonic()
        with pytest.raises(httpx.HTTPError) if busy else ExitStack():
            done = program.finish(30)
            open_answers.close()
            if busy:
                raise httpx.HTTPError("the connection ended")
    assert done.returncode == 1 and time.monotonic() - begin < 14
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: tiny: rank {lost} (")
    assert "does not answer any more" in line and line.endswith("start the server again")


@pytest.mark.slow  # test_two_hosts.py starts real processes, tests/launch/test_local.py torchrun
def test_torchrun_starts_the_command(export: Path) -> None:
    """The real launcher, once: the text is that of one process."""
    words = ["-m", "serve", "generate", export, "--prompt", "x", "--tp", "2", "--device", "cpu"]
    done = run(*words, ranks=2, code=1, fresh=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == ["error: this model has no tokenizer; send token ids"]


REFUSED = [
    ("qwen3", 3, 1, 3, "--tp 3: must divide attention.n_heads = 8"),
    ("qwen3", 8, 1, 8, "--tp 8: must divide attention.n_kv_heads = 4"),
    ("qwen3", 1, 3, 3, "--ep 3: must divide the number of experts, 8"),
    ("qwen3", 0, 1, 1, "--tp 0: must be at least 1"),
    ("qwen3", 1, -2, 1, "--ep -2: must be at least 1"),
    ("qwen3", 2, 1, 1, "--tp 2 --ep 1: 2 ranks are needed, there is 1; start them with torchrun "
     "--nproc-per-node 2 -m serve"),
    ("qwen3", 2, 4, 2, "--tp 2 --ep 4: 4 or 8 ranks are needed, there are 2"),
    ("qwen3", 1, 1, 2, "there are 2 ranks: give --tp or --ep"),
    ("qwen3", 2, 2, 3, "2 or 4 ranks are needed, there are 3"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "tp", "ep", "world", "message"), REFUSED)
def test_degrees_that_do_not_fit(family: str, tp: int, ep: int, world: int, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        resolve_serving(model_of(family), tp, ep, world)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("tp", "ep", "world", "dims"),
    [
        (2, 1, 2, ParallelDims(1, 1, 2, 1, 1, 2)),
        (1, 2, 2, ParallelDims(1, 2, 1, 1, 2, 1)),
        (2, 2, 2, ParallelDims(1, 1, 2, 1, 2, 1)),
        (2, 2, 4, ParallelDims(1, 2, 2, 1, 2, 2)),
        (2, 4, 4, ParallelDims(1, 2, 2, 1, 4, 1)),
        (4, 2, 4, ParallelDims(1, 1, 4, 2, 2, 1)),
        (1, 1, 1, ParallelDims(1, 1, 1, 1, 1, 1)),
    ],
)
def test_degrees(tp: int, ep: int, world: int, dims: ParallelDims) -> None:
    found = resolve_serving(model_of("qwen3"), tp, ep, world)
    assert found == dims and found.world == world
    assert dims.dp_shard * dims.tp == dims.efsdp * dims.ep * dims.etp


def test_one_process_is_told_how_to_start_ranks(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(export), "--prompt", "x", "--tp", "2"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "torchrun --nproc-per-node 2 -m serve" in line


FAULTS: list[tuple[dict[str, object], list[str], str]] = [
    ({}, ["--device", "cuda:0"], "--device cuda:0: must be auto, cpu or cuda"),
    ({}, ["--kv-tokens", "999999999"], "--kv-tokens 999999999: needs"),
    ({}, ["--absorb-mla"], "--absorb-mla: the model has no multi-head latent attention"),
    ({"max_position_embeddings": 1}, [], "max_position_embeddings"),
]
"""Changes of the export's configuration, options, and the message."""


@needs_forks
@pytest.mark.long
def test_faults_take_one_line(export: Path, tmp_path: Path) -> None:
    """On rank 0. The launcher then ends the others, which here run to the end of their pause; all
    at once, because they sleep."""
    programs = []
    with ExitStack() as running:
        for i, (changes, options, _) in enumerate(FAULTS):
            folder = shutil.copytree(export, tmp_path / str(i) / "tiny")
            config = json.loads((export / "config.json").read_text()) | changes
            (folder / "config.json").write_text(json.dumps(config))
            words = ["-m", "serve", str(folder), "--port", "0", "--tp", "2", *options]
            programs.append(running.enter_context(Program(words, environment(), ranks=2)))
        ended = [program.finish(60) for program in programs]
    for (_, _, message), done in zip(FAULTS, ended, strict=True):
        first, *others = done.stderr.splitlines()
        assert done.returncode == 1 and first.startswith("error: ") and message in first, done
        assert all(line.startswith("rank 1: error: ") for line in others)
        assert not done.stdout


BRIEF = """
import sys
from parallel import launch_environment
from serve.__main__ import main
launch_environment._FIRST_RANK_S = 4.0
sys.exit(main(sys.argv[1:]))
"""
"""The command, whose other ranks wait for less than 15 s until rank 0 has printed."""


@needs_forks
def test_ranks_with_other_settings(export: Path) -> None:
    """As on two hosts, each with a command of its own."""
    shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # fmt: skip
    words = ["-c", BRIEF, str(export), "--port", "0", "--tp", "2"]
    with ExitStack() as running:
        programs = [
            running.enter_context(
                Program([*words, "--page-size", size], environment() | shared | {"RANK": r})
            )
            for r, size in (("0", "16"), ("1", "32"))
        ]
        done = [program.finish(30) for program in programs]
    assert [one.returncode for one in done] == [2, 2]
    assert done[0].stderr == "error: rank 1: other settings than rank 0: --page-size\n"
