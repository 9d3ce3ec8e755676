"""Forks behave like processes: streams, exit codes, environment, signals, and ranks that fail."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forks
from tests.runs import ROOT, run

pytestmark = pytest.mark.skipif(not forks.POSSIBLE, reason="Linux only")
BARE = ("json",)
"""No modules to import: the cheapest template."""


def test_a_fork_is_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN", "here")
    code = (
        "import os, sys; print(os.environ.get('GIVEN'), *sys.argv[1:]);"
        "print(os.getpid(), os.getcwd()); os.environ['GIVEN'] = 'there'; sys.stderr.write('!')"
    )
    done = [run("-c", code, "a", "b c", modules=BARE) for _ in range(2)]
    pids = set()
    for one in done:
        first, second = one.stdout.splitlines()
        assert first == "here a b c" and one.stderr == "!"
        pid, folder = second.split()
        assert folder == str(ROOT)
        pids.add(int(pid))
    assert len(pids) == 2 and os.getpid() not in pids


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit('a line')", 1),
        ("import os; os._exit(7)", 7),
        ("1 / 0", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("import os; os.abort()", -6),
    ],
)
def test_exit_codes_are_those_of_python(code: str, expected: int) -> None:
    ours = run("-c", code, modules=BARE, code=expected)
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert theirs.returncode == expected
    assert ours.stdout == theirs.stdout
    assert ours.stderr.splitlines()[-1:] == theirs.stderr.splitlines()[-1:]


def test_at_exit_and_threads_are_waited_for() -> None:
    code = (
        "import atexit, threading, time\n"
        "atexit.register(print, 'last')\n"
        "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()\n"
    )
    assert run("-c", code, modules=BARE).stdout == "thread\nlast\n"


def test_ranks_are_what_torchrun_makes_them() -> None:
    names = "('RANK', 'LOCAL_RANK', 'WORLD_SIZE')"
    code = f"import os, sys; sys.stdout.write(' '.join(os.environ[k] for k in {names}) + '\\n')"
    done = run("-c", code, modules=BARE, ranks=3)
    assert sorted(done.stdout.splitlines()) == ["0 0 3", "1 1 3", "2 2 3"]


def test_ranks_order_sets_differently() -> None:
    """As in separate processes, so that an order of collectives taken from a set is detected."""
    code = "import os, sys; sys.stdout.write(f\"{os.environ['RANK']} {hash('a name')}\\n\")"
    done = run("-c", code, modules=BARE, ranks=3)
    found = dict(line.split() for line in done.stdout.splitlines())
    assert found["0"] == found["2"] != found["1"]


def test_a_rank_that_fails_ends_the_others() -> None:
    code = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit(5); time.sleep(600)"
    run("-c", code, modules=BARE, ranks=3, code=1, timeout=300)  # far less than they sleep


def test_a_hung_program_is_ended_with_what_it_said() -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with pytest.raises(subprocess.TimeoutExpired) as late:
        run("-c", code, modules=BARE, ranks=2, timeout=0.5)
    for pid in str(late.value.output).split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_what_is_random_differs_between_forks() -> None:
    code = "import random, numpy; print(random.random(), numpy.random.rand())"
    printed = [run("-c", code, modules=("numpy",)).stdout.split() for _ in range(2)]
    assert printed[0][0] != printed[1][0] and printed[0][1] != printed[1][1]


def test_a_template_with_threads_refuses() -> None:
    """A fork copies only one thread, and would wait forever for locks of the others."""
    with socket.socket(socket.AF_UNIX) as listener:
        number = str(listener.fileno())
        done = subprocess.run(
            [sys.executable, "-P", ROOT / "tests" / "template.py", number, "tests.threaded"],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
            pass_fds=[listener.fileno()],
        )  # fmt: skip
    assert done.returncode == 1 and "a thread would be lost" in done.stderr


PARENT = """
import os, sys
print(os.getppid())
if len(sys.argv) > 1:
    from pathlib import Path
    from tests.forks import Program
    program = Program(["-c", "import time; time.sleep(600)"], dict(os.environ), ("json",))
    print(*program.pids, flush=True)
    os._exit(0)  # it does not end its program
"""


def test_processes_of_a_session_share_templates_and_leave_nothing() -> None:
    """The second process starts a program and dies; its template kills the program."""
    here = run("-c", PARENT, modules=BARE).stdout.split()
    there = subprocess.run(
        [sys.executable, "-c", PARENT, "start"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True,
    ).stdout.split()  # fmt: skip
    left = int(there[1])
    assert run("-c", PARENT, modules=BARE).stdout.split() == here
    with pytest.raises(ProcessLookupError):  # the template has answered since
        os.kill(left, 0)


SPIN = """
import time
import pytest

@pytest.fixture
def made(request):
    spin(0.4 * ("setup" in request.node.name))

def test_call():
    spin(0.4)

def test_setup(made):
    pass

def test_short(made):
    pass

@pytest.mark.slow
def test_marked():
    spin(0.4)

def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
"""
PYTEST = """
import sys
import pytest
import tests.conftest
tests.conftest.LIMIT_S = 0.05
sys.exit(pytest.main(["-qrA", "-p", "tests.conftest", "-p", "no:cacheprovider", sys.argv[1]]))
"""


def test_a_test_above_the_limit_fails_unless_marked(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(SPIN)
    done = run("-c", PYTEST, file, modules=("pytest",), code=1)
    assert done.stdout.count(": make it faster, or mark it slow") >= 2
    ended = re.findall(r"^(PASSED|FAILED|ERROR) .*::test_(\w+)", done.stdout, re.MULTILINE)
    assert sorted(ended) == [
        ("ERROR", "setup"), ("FAILED", "call"), ("PASSED", "marked"), ("PASSED", "short"),
    ]  # fmt: skip
