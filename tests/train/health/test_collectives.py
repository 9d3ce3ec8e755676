"""The late rank, found in records of collectives as torch's flight recorder gives them."""

import random

import pytest

from train.health.collectives import Entry, find_late

WORLD = 4
STEP: list[tuple[str, str]] = [("all", "all_reduce(1)"), ("dp", "all_gather"), ("tp", "all_gather"),
        ("tp", "reduce_scatter"), ("ep", "all_to_all"), ("ep", "all_to_all"),
        ("all", "all_reduce(3)"), ("dp", "reduce_scatter"), ("all", "all_reduce(336)")]  # fmt: skip
GROUPS: dict[str, list[tuple[int, ...]]] = {
    "all": [(0, 1, 2, 3)], "dp": [(0, 2), (1, 3)], "tp": [(0, 1), (2, 3)], "ep": [(0, 1, 2, 3)],
}  # fmt: skip


def program(steps: int) -> list[tuple[str, str]]:
    return [operation for _ in range(steps) for operation in STEP]


def simulate(programs: list[list[tuple[str, str]]], ring: int = 2000) -> dict[int, list[Entry]]:
    """Run the programs until none can go on; operations match by group and number, as in gloo."""
    place = [0] * WORLD
    counts: list[dict[str, int]] = [{} for _ in range(WORLD)]
    waiting: list[tuple[str, tuple[int, ...], int, str] | None] = [None] * WORLD
    records: dict[int, list[list[object]]] = {rank: [] for rank in range(WORLD)}
    time = 0
    moved = True
    while moved:
        moved = False
        for rank in range(WORLD):
            if waiting[rank] is None and place[rank] < len(programs[rank]):
                title, operation = programs[rank][place[rank]]
                members = next(m for m in GROUPS[title] if rank in m)
                number = counts[rank][title] = counts[rank].get(title, 0) + 1
                waiting[rank] = (title, members, number, operation)
                time += 1
                name = f"{title}-{min(members)}"
                records[rank].append([name, title, members, number, operation, False, time])
                place[rank] += 1
                moved = True
        for rank in range(WORLD):
            now = waiting[rank]
            if now and all(waiting[other] == now for other in now[1]):
                for other in now[1]:
                    waiting[other] = None
                    records[other][-1][5] = True
                moved = True
    return {
        rank: [Entry(*entry) for entry in entries][-ring:]  # type: ignore[arg-type]
        for rank, entries in records.items()
    }


@pytest.mark.parametrize("ring", [30, 2000])
@pytest.mark.parametrize("position", range(len(STEP)))
def test_a_rank_that_skips_any_collective_is_named(position: int, ring: int) -> None:
    for rank in range(WORLD):
        programs = [program(8) for _ in range(WORLD)]
        skipped = programs[rank].pop(5 * len(STEP) + position)
        late = find_late(simulate(programs, ring))
        assert late is not None
        twins = [r for r in range(WORLD) if any({rank, r} <= {*m} for m in GROUPS[skipped[0]])]
        assert late.ranks == (rank,) or (len(twins) == 2 and {*late.ranks} <= {*twins}), late
        # of two equal operations in a row either may be the one that is missing
        assert skipped[1].partition("(")[0] in late.line or position in (0, 6, 8), late.line


@pytest.mark.parametrize("position", range(len(STEP)))
def test_a_rank_that_enters_nothing_more_is_named(position: int) -> None:
    for rank in range(WORLD):
        programs = [program(4) for _ in range(WORLD)]
        missed = programs[rank][2 * len(STEP) + position]
        del programs[rank][2 * len(STEP) + position :]
        late = find_late(simulate(programs))
        assert late is not None and late.ranks == (rank,)
        assert f"rank {rank} did not enter" in late.line and missed[1] in late.line


def test_an_absent_rank_is_named_with_what_the_others_wait_for() -> None:
    programs = [program(4) for _ in range(WORLD)]
    del programs[2][20:]
    records = simulate(programs)
    del records[2]
    late = find_late(records, absent=[2])
    assert late is not None and late.ranks == (2,) and "waits for it in" in late.line


def test_ranks_that_are_equal_are_not_named() -> None:
    assert find_late(simulate([program(3)] * WORLD)) is None
    assert find_late({rank: [] for rank in range(WORLD)}) is None
    source = random.Random(0)
    for _ in range(50):  # all wait in the same operation: the network, no rank
        records = simulate([program(3)] * WORLD)
        cut = source.randrange(1, 27)
        for entries in records.values():
            last = entries[cut - 1]
            entries[cut - 1 :] = [
                Entry(last.group, last.title, last.members, last.number, last.operation, False, 0)
            ]
        assert find_late(records) is None


@pytest.mark.parametrize("skipping", [0, 1])
def test_after_collectives_that_occur_once_the_skipping_one_of_two_ranks_is_named(
    skipping: int,
) -> None:
    """The last operation before is common, but what followed it elsewhere says nothing here: as
    after the first checkpoint of a run."""
    step = ["all_reduce(3)", "all_reduce(1)", "all_gather", "all_reduce(2 x 15)"]
    validation = ["all_reduce(1)", "all_reduce(1)", "all_gather"]
    common = [*step * 3, *validation, *step, "broadcast", "all_reduce(1)"]
    records = {}
    for rank in (0, 1):
        rest = step[1:] if rank == skipping else step
        operations = [*common, rest[0]]  # the first that differs; both wait in it
        records[rank] = [
            Entry("all", "all", (0, 1), number, operation, number < len(operations), number)
            for number, operation in enumerate(operations, 1)
        ]
    late = find_late(records)
    assert late is not None and late.ranks == (skipping,)
    assert f"rank {skipping} entered all_reduce(1)" in late.line
