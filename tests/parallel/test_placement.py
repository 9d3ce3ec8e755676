"""Valid environment variables of launchers, and those refused with a one-line error."""

import pytest

from configs.errors import UserError
from parallel.launch_environment import LaunchEnvironment, read_launch_environment, read_world

TORCHRUN = {
    "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node-1.cluster", "MASTER_PORT": "29500",
}  # fmt: skip


def test_what_torchrun_sets() -> None:
    assert read_launch_environment(TORCHRUN) == LaunchEnvironment(
        1, 4, 1, 2, "node-1.cluster", 29500
    )
    for address in ("localhost", "10.0.0.1", "fe80::1%eth0"):
        assert read_launch_environment({**TORCHRUN, "MASTER_ADDR": address}).is_launched


def test_no_launcher() -> None:
    for env in ({}, {"WORLD_SIZE": "1"}, {"LOCAL_RANK": "0", "MASTER_PORT": "29500"}):
        assert (
            read_launch_environment(env) == LaunchEnvironment()
            and not read_launch_environment(env).is_launched
        )
    alone = read_launch_environment({"RANK": "0", "WORLD_SIZE": "1"})
    assert alone.world == 1 and alone.is_launched


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in TORCHRUN.items() if key != name}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2, but RANK is not set"),
        (without("RANK"), "WORLD_SIZE = 4, but RANK is not set"),
        (without("WORLD_SIZE"), "RANK is set, but WORLD_SIZE is not"),
        (without("LOCAL_RANK"), "LOCAL_RANK is not set"),
        (without("MASTER_ADDR"), "MASTER_ADDR is not set"),
        (without("MASTER_PORT"), "MASTER_PORT is not set"),
        *[
            ({**TORCHRUN, name: value}, f"{name} = ")
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
            for value in ("", " ", "two", "-1", "1.0", "1e3", "9" * 5000, "0x1", "\u0663", "1\n2")
        ],
        ({"WORLD_SIZE": ""}, "WORLD_SIZE = ''"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE = '0'"),
        ({**TORCHRUN, "RANK": "4"}, "RANK = '4': must be an integer from 0 to 3"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK = '2': must be an integer from 0 to 1"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE = '5'"),
        ({**TORCHRUN, "MASTER_PORT": "0"}, "MASTER_PORT = '0'"),
        ({**TORCHRUN, "MASTER_PORT": "65536"}, "MASTER_PORT = '65536'"),
        *[
            ({**TORCHRUN, "MASTER_ADDR": value}, "MASTER_ADDR = ")
            for value in ("", "two words", "a\nb", "x" * 5000, "http://a/b")
        ],
    ],
)
def test_what_cannot_be_right_is_one_line(env: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        read_launch_environment(env)
    line = str(caught.value)
    assert expected in line and "\n" not in line and len(line) < 300


def test_the_number_of_ranks_alone() -> None:
    assert read_world({}) is None and read_world({"WORLD_SIZE": "8"}) == 8
    with pytest.raises(UserError, match="WORLD_SIZE = 'x'"):
        read_world({"WORLD_SIZE": "x"})
