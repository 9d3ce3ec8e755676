"""Signals in every phase: the exit code, and no step lost beyond the current one."""

import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from configs.health import heartbeat
from tests import forks
from tests.faults.supervised import final_weights, losses
from tests.runs import TINY, run, started
from tests.train.in_process import run_train

pytestmark = pytest.mark.skipif(not forks.POSSIBLE, reason="Linux only")
PHASES = ["start", "load", "compile", "forward", "backward", "optimizer", "validation", "save",
          "end"]  # fmt: skip
STOPS = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}
SHORT = {("save", signal.SIGINT)}
CASES = [
    pytest.param(
        phase, stop, id=f"{phase}-{stop.name}",
        marks=[] if (phase, stop) in SHORT else [pytest.mark.slow],
    )
    for phase in PHASES
    for stop in STOPS
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    run_train(TINY, *words(corpus), f"--run.dir={folder}", "--checkpoint.async_save=false")
    return folder


def words(corpus: Path) -> list[str]:
    return [
        f"--data.source={corpus}", f"--data.cache_dir={corpus.parent / 'corpus-cache'}",
        "--train.steps=12", "--checkpoint.every=3", "--validation.every=3",
        "--checkpoint.async_save=true",
    ]  # fmt: skip


@pytest.mark.parametrize(("phase", "stop"), CASES)
def test_a_signal_in_any_phase(
    phase: str, stop: signal.Signals, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    arguments = [TINY, *words(corpus), f"--run.dir={tmp_path / 'run'}"]
    beats = tmp_path / "beats"
    beats.mkdir()
    if phase == "compile":  # within the first forward pass
        arguments.append("--parallel.compile=true")
    if phase == "load":
        run_train(*arguments, "--train.steps=5", "--schedule.steps=12")  # something to load
    with started("-m", "train", *arguments, env={heartbeat.FOLDER_VARIABLE: str(beats)}) as program:
        deadline = time.monotonic() + 60
        while True:
            beat = heartbeat.read(beats, 0)
            if beat and beat.phase == phase and (beat.done >= 4 or phase in ("start", "load")):
                break
            if beat and phase == "compile" and beat.phase == "forward":
                time.sleep(1.0)
                break
            assert time.monotonic() < deadline and program.is_running()
            time.sleep(0.0005)  # leaves the processor to the training
        program.signal(stop)
        done = program.finish(30)
    expected = 0 if phase == "end" else STOPS[stop]  # the run is complete
    assert done.returncode == expected, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    steps = [int(p.name[5:]) for p in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert max(steps, default=0) >= beat.done, "no complete step is lost"
    if phase == "compile":  # compiled code rounds differently
        assert not losses(tmp_path / "run") and beat.done == 0
        return
    run_train(*arguments, "--checkpoint.async_save=false")
    assert losses(tmp_path / "run") == losses(whole)
    assert final_weights(tmp_path / "run") == final_weights(whole)


COMPILES = """
import sys, time
import train.trainer
from train.__main__ import main
step, slow = train.trainer.train_step, int(sys.argv[1])

def stepped(*arguments, **named):
    if named["step"] == slow:
        print("compiling", flush=True)
        time.sleep(1.5 if slow > 1 else 60.0)
    return step(*arguments, **named)

train.trainer.train_step = stepped
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("slow", [1, 2])
def test_only_the_first_step_is_not_waited_for(slow: int, corpus: Path, tmp_path: Path) -> None:
    """It may compile for minutes, and nothing is lost with it."""
    folder = tmp_path / "run"
    with started("-c", COMPILES, slow, TINY, *words(corpus), f"--run.dir={folder}") as program:
        deadline = time.monotonic() + 60
        while "compiling" not in program.printed()[0]:
            assert time.monotonic() < deadline and program.is_running(), program.printed()
            time.sleep(0.02)
        program.signal(signal.SIGTERM)
        done = program.finish(40)
    assert done.returncode == os.EX_TEMPFAIL and "Traceback" not in done.stderr, done.stderr
    assert len(losses(folder)) == slow - 1
    assert len(list((folder / "checkpoints").glob("step-*"))) == slow - 1


BLOCKED = """
import os, signal, sys, time
from train.process.stop import StopSignal
first, second, saves = (int(word) for word in sys.argv[1:])
with StopSignal() as stop:
    if saves:
        stop.save_first()
    os.kill(os.getpid(), first)
    time.sleep(0.5)
    os.kill(os.getpid(), first)  # forwarded by a launcher: the same signal
    time.sleep(2.0)
    assert saves and stop.number == first
    if second:
        os.kill(os.getpid(), second)
        time.sleep(20)
sys.exit(stop.exit_code + 1)
"""


def test_the_first_signal_waits_only_where_there_is_something_to_save() -> None:
    """A second one ends the process at once; code + 1: the program came to its end."""
    cases = {
        (signal.SIGTERM, 0, 0): 75, (signal.SIGINT, 0, 0): 130, (signal.SIGUSR1, 0, 1): 76,
        (signal.SIGTERM, signal.SIGTERM, 1): 75, (signal.SIGUSR1, signal.SIGTERM, 1): 75,
        (signal.SIGINT, signal.SIGINT, 1): 130,
    }  # fmt: skip
    start = time.monotonic()
    with ExitStack() as stack:  # all at once, because they sleep
        programs = [stack.enter_context(started("-c", BLOCKED, *map(int, case))) for case in cases]
        ended = [program.finish(60) for program in programs]
    for case, code, done in zip(cases, cases.values(), ended, strict=True):
        assert done.returncode == code, (case, done)
    assert time.monotonic() - start < 15


def test_a_signal_reaches_a_main_thread_that_waits_outside_of_python(tmp_path: Path) -> None:
    code = (
        "import os, sys, threading, time\n"
        "from datetime import timedelta\n"
        "from torch.distributed import HashStore\n"
        "from train.process.stop import StopSignal\n"
        "with StopSignal():\n"
        "    kill = lambda: (time.sleep(0.5), os.kill(os.getpid(), 15))\n"
        "    threading.Thread(target=kill, daemon=True).start()\n"
        "    HashStore().wait(['never'], timedelta(seconds=30))\n"
    )
    start = time.monotonic()
    run("-c", code, code=os.EX_TEMPFAIL)
    assert time.monotonic() - start < 15


def test_a_log_on_a_full_disk_is_no_error(tmp_path: Path) -> None:
    """Writes beyond a size fail, as on a full disk; then they work again."""
    code = (
        "import os, resource, sys\n"
        "out = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY | os.O_APPEND)\n"
        "os.dup2(out, 1)\n"
        "os.dup2(out, 2)\n"
        "from train.process.log_streams import use_log_streams\n"
        "use_log_streams()\n"
        "print('first', flush=True)\n"
        "_, most = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))\n"
        "for i in range(1000):\n"
        "    print('x' * 100, flush=True)\n"
        "    print('y' * 100, file=sys.stderr)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))\n"
        "print('last', flush=True)\n"
    )
    log = tmp_path / "log"
    run("-c", code, log, env={heartbeat.SUPERVISOR_VARIABLE: "1"})
    assert log.read_text().startswith("first\nxxx") and "last\n" in log.read_text()
