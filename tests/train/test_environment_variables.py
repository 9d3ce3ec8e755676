"""`python -m train` with invalid variables of a launcher: a one-line error, exit code 2."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from parallel import launch_environment
from tests.runs import TINY
from train.__main__ import main


class Exited(BaseException):
    """Replacement for ending the test process."""


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2, but RANK is not set"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE = ''"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two'"),
        ({"RANK": "0"}, "WORLD_SIZE is not"),
        ({"RANK": "", "WORLD_SIZE": "1"}, "RANK = ''"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK = '2'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set"),
    ],
)
@pytest.mark.parametrize("check", [False, True])
def test_one_line_and_exit_2(
    env: dict[str, str], expected: str, check: bool, overrides: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def leave(code: int) -> None:
        raise Exited(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr("train.check._bytes_per_rank", lambda *_: [])  # takes half a second
    monkeypatch.setattr(launch_environment, "time", SimpleNamespace(sleep=lambda seconds: None))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    try:
        small = ["--model.n_layers=1", "--model.n_dense_layers=0"]
        code = main([str(TINY), *overrides, *small, *["--check"] * check])
    except Exited as left:
        (code,) = left.args
    err = capfd.readouterr().err
    if check and env.get("WORLD_SIZE", "2").isdigit():  # a check only needs the number of ranks
        assert code == 0 and not err
    else:
        assert code == 2 and expected in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def set_only(
    names: tuple[str, ...], given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the variables `names` only the given ones are set during the test."""
    for name in names:
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "20000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
                         ({"GOMP_SPINCOUNT": "7"}, "7")],
)  # fmt: skip
def test_openmp_spins_briefly_unless_the_user_decides(
    given: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_only(("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"), given, monkeypatch)
    launch_environment.configure_libraries()
    assert os.environ["OMP_WAIT_POLICY"] == given.get("OMP_WAIT_POLICY", "PASSIVE")
    assert os.environ.get("GOMP_SPINCOUNT") == spins


@pytest.mark.parametrize(
    ("given", "limit"),
    [({}, "AVX512_CORE_BF16"), ({"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, "DEFAULT"),
     ({"DNNL_MAX_CPU_ISA": "AVX2"}, None)],
)  # fmt: skip
def test_amx_is_disabled_unless_the_user_decides(
    given: dict[str, str], limit: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_only(("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"), given, monkeypatch)
    launch_environment.disable_amx()
    assert os.environ.get("ONEDNN_MAX_CPU_ISA") == limit
