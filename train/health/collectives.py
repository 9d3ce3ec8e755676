"""Which rank is late in which collective, from the flight recorders of all ranks.

torch records the last 2,000 collectives of every process: operation, group, a number that counts
those of the group, and whether it is complete. gloo and NCCL have a recorder each. All ranks of a
group must enter the same operations in the same order, so the first difference names the rank.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d

_RECORDERS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
_SAME_SIZE = ("all_reduce", "allreduce", "broadcast", "reduce")
"""Operations whose input has the same size on all ranks."""
_CONTEXT = 8
"""Earlier operations that decide which operation usually follows."""


@dataclass(frozen=True)
class Entry:
    """A collective that this rank has entered."""

    group: str
    """Unique name of the process group."""
    title: str
    """Its description, such as the axis of the mesh."""
    members: tuple[int, ...]
    number: int
    """Position among the collectives of the group, from 1."""
    operation: str
    complete: bool
    time_ns: int

    def __str__(self) -> str:
        return f"{self.operation} number {self.number} of group {self.title}"


def recorded() -> list[dict[str, Any]]:
    """The collectives of this process as JSON values, oldest first."""
    world = dist.distributed_c10d._world
    members = {name: dist.get_process_group_ranks(pg) for pg, name in world.pg_names.items()}
    found = []
    for name in _RECORDERS:
        dump: Callable[[bool, bool], bytes] | None = getattr(_distributed_c10d, name, None)
        if dump is None:
            continue
        for entry in json.loads(dump(True, False)).get("entries", []):
            group, title = entry["process_group"]
            if entry["is_p2p"] or group not in members:
                continue
            operation = entry["profiling_name"].split(":")[-1]
            sizes = entry["input_sizes"]
            if operation in _SAME_SIZE and sizes:
                operation += f"({' x '.join(map(str, sizes[0]))})"
            found.append(
                {
                    "group": group, "title": title or group, "members": members[group],
                    "number": entry["collective_seq_id"], "operation": operation,
                    "complete": entry["retired"] or entry["state"] == "completed",
                    "time_ns": entry["time_created_ns"],
                }
            )  # fmt: skip
    return sorted(found, key=lambda entry: entry["time_ns"])


def waits_for_others() -> bool:
    """Whether this process has entered a collective that is not complete."""
    for name in _RECORDERS:
        dump: Callable[[bool, bool], bytes] | None = getattr(_distributed_c10d, name, None)
        if dump is None:
            continue
        for status in json.loads(dump(False, False)).get("pg_status", {}).values():
            if int(status["last_enqueued_collective"]) > int(status["last_completed_collective"]):
                return True
    return False


def parse(entries: Iterable[Mapping[str, Any]]) -> list[Entry]:
    """The entries that another rank has sent."""
    return [Entry(**{**entry, "members": tuple(entry["members"])}) for entry in entries]


@dataclass(frozen=True)
class Late:
    """The ranks that others wait for."""

    ranks: tuple[int, ...]
    line: str


def find_late(records: Mapping[int, list[Entry]], absent: Iterable[int] = ()) -> Late | None:
    """The late ranks and the collective that they miss; None if no rank waits for another.

    records: of every rank that answered. absent: ranks that did not.
    """
    waits = {rank: _open(entries) for rank, entries in records.items()}
    gone = set(absent)
    if gone:
        waiting = {r: e for r, e in waits.items() if e and gone & {*e.members}}
        if not waiting:
            return None
        entry = next(e for e in waiting.values() if e)
        alike = [
            r
            for r, e in waiting.items()
            if e and (e.group, e.number) == (entry.group, entry.number)
        ]
        return Late(tuple(sorted(gone)), f"{_ranks(alike)} waits for it in {entry}")
    return _different(records) or _behind(records, waits) or _skipped(records)


def _different(records: Mapping[int, list[Entry]]) -> Late | None:
    """Ranks that entered another operation than the others under the same number of a group."""
    found = []
    for by_rank in _by_group(records).values():
        numbers = {n for entries in by_rank.values() for n in entries}
        for number in sorted(numbers):
            here = {rank: es[number] for rank, es in by_rank.items() if number in es}
            if len({entry.operation for entry in here.values()}) > 1:
                history = [e for n, e in sorted(next(iter(by_rank.values())).items()) if n < number]
                found.append((min(e.time_ns for e in here.values()), here, history))
                break
    if not found:
        return None
    _, here, history = min(found, key=lambda each: each[0])
    return _odd_one(here, history)


def _behind(records: Mapping[int, list[Entry]], waits: Mapping[int, Entry | None]) -> Late | None:
    """Ranks that have not entered a collective in which others wait, and wait for no rank."""
    groups = _by_group(records)
    waits_for: dict[int, set[int]] = {}
    for rank, entry in waits.items():
        waits_for[rank] = set()
        if entry:
            waits_for[rank] = {
                other for other in entry.members
                if other in records and entry.number not in groups[entry.group].get(other, {})
            }  # fmt: skip
    causes = {late for others in waits_for.values() for late in others if not waits_for[late]}
    if not causes:
        return None
    entered = [waits[rank] for rank, others in waits_for.items() if others & causes]
    # the late rank may be missed in several groups: the first is where it stopped
    missed = min((entry for entry in entered if entry), key=lambda entry: entry.time_ns)
    here = [
        r for r, e in waits.items() if e and (e.group, e.number) == (missed.group, missed.number)
    ]
    return Late(
        tuple(sorted(causes)),
        f"{_ranks(sorted(causes))} did not enter {missed}, in which {_ranks(here)} waits",
    )


def _skipped(records: Mapping[int, list[Entry]]) -> Late | None:
    """Ranks that wait for each other in different groups: one of them skipped a collective. All
    ranks run the same program, so the order of their operations in all groups is the same."""
    keys = [{(e.title, e.number) for e in entries} for entries in records.values()]
    shared = set.intersection(*keys)
    tails = {}
    for rank, entries in records.items():
        # full recorders have dropped different numbers of operations
        start = next((i for i, e in enumerate(entries) if (e.title, e.number) in shared), 0)
        tails[rank] = entries[start:]
    longest = min(len(entries) for entries in tails.values())
    for position in range(longest):
        here = {rank: entries[position] for rank, entries in tails.items()}
        if len({(e.title, e.operation) for e in here.values()}) > 1:
            history = next(iter(tails.values()))[:position]
            return _odd_one(here, history)
    return None


def _odd_one(here: Mapping[int, Entry], history: list[Entry]) -> Late:
    """The ranks whose operation is not that of most, or not the one that usually follows."""
    kinds = Counter((e.title, e.operation) for e in here.values())
    (usual, most), *others = kinds.most_common()
    if others and others[0][1] == most:
        usual = _usual_next([(e.title, e.operation) for e in history], {*kinds}) or usual
    right = {r: e for r, e in here.items() if (e.title, e.operation) == usual}
    wrong = {r: e for r, e in here.items() if r not in right}
    missed, entered = next(iter(right.values())), next(iter(wrong.values()))
    return Late(
        tuple(sorted(wrong)),
        f"{_ranks(sorted(wrong))} entered {entered} instead of {missed}, which "
        f"{_ranks(sorted(right))} entered",
    )


def _usual_next(
    history: list[tuple[str, str]], kinds: set[tuple[str, str]]
) -> tuple[str, str] | None:
    """Which of the operations followed the last ones of the history before. If the history had no
    three of them in this order, the one that is usually followed by the other: a rank that skipped
    it would have entered the other."""
    for length in range(min(_CONTEXT, len(history)), 0, -1):
        if length == 2 and (first := _usual_first(history, kinds)):
            return first
        context = history[-length:]
        following = Counter(
            history[i + length]
            for i in range(len(history) - length)
            if history[i : i + length] == context and history[i + length] in kinds
        )
        if following:
            return following.most_common(1)[0][0]
    return None


def _usual_first(
    history: list[tuple[str, str]], kinds: set[tuple[str, str]]
) -> tuple[str, str] | None:
    """Which of two operations is followed by the other, more often than the reverse."""
    if len(kinds) != 2:
        return None
    one, other = sorted(kinds)
    pairs = Counter(pairwise(history))
    difference = pairs[one, other] - pairs[other, one]
    return None if not difference else one if difference > 0 else other


def _by_group(records: Mapping[int, list[Entry]]) -> dict[str, dict[int, dict[int, Entry]]]:
    """Group -> rank -> number -> entry, for all members that answered."""
    found: dict[str, dict[int, dict[int, Entry]]] = {}
    for rank, entries in records.items():
        for entry in entries:
            found.setdefault(entry.group, {}).setdefault(rank, {})[entry.number] = entry
    return found


def _open(entries: list[Entry]) -> Entry | None:
    """The first collective that this rank entered and that is not complete."""
    return next((entry for entry in entries if not entry.complete), None)


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"rank {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
