"""Which checkpoints are kept.

Kept are the newest `keep`, those of every `every`-th step, and the `best` ones with the lowest
validation loss. Only checkpoints that are known to be sound count: this process wrote them, or
every file was compared with the manifest. One is removed if `keep` newer ones count; as many as
necessary are compared, divided among the ranks, and remembered until one of their files changes.
These are neither counted nor removed: links (their targets may belong to others), folders without a
manifest, and anything newer than the checkpoint just written.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from configs.errors import UserError
from parallel.store_group import StoreGroup
from train.checkpoint.manifest_content import step_of
from train.checkpoint.storage.base import Signature, Storage

_SOUND: dict[str, Signature] = {}
"""Checkpoints found sound, by address."""


@dataclass(frozen=True)
class Retention:
    """Numbers of checkpoints to keep; 0 for the last two: none for this reason."""

    keep: int
    """Newest checkpoints."""
    every: int = 0
    """Steps of which checkpoints are kept forever: the multiples of this."""
    best: int = 0
    """Checkpoints with the lowest validation loss."""


class _Call(Protocol):
    def __call__(self, method: str, *frames: bytes, **arguments: Any) -> Any: ...


def remember(address: str, signature: Signature) -> None:
    """Record that this process wrote the checkpoint, or compared it with its manifest."""
    _SOUND[address] = signature


def prune(
    storage: Storage,
    written: str,
    rule: Retention,
    call: _Call,
    group: StoreGroup,
    say: Callable[[str], None],
) -> None:
    """Remove checkpoints older than the `keep` newest sound ones, but for those that another part
    of the rule keeps; all ranks call it together.

    written: the checkpoint just saved, the newest that counts. say: called on rank 0 with a line
    for each folder that could not be removed.
    """

    def look() -> list[list[Any]]:
        found = call("older", name=written)
        return [
            [name, signature, _SOUND.get(storage.address(name)) == signature]
            for name, signature in found
        ]

    older = group.on_first(look)
    known = {name for name, _, is_known in older if is_known}
    signatures = {name: signature for name, signature, _ in older}
    names = list(signatures)

    def is_sound(name: str) -> bool:
        if name in known:
            return True
        if _faults(name, call, group):
            return False
        known.add(name)
        remember(storage.address(name), signatures[name])
        return True

    sound, rest = 1, []
    for i, name in enumerate(names):
        if sound == rule.keep:
            rest = names[i:]
            break
        if len(names) - i <= rule.keep - sound:
            break  # too few to remove one of them, sound or not
        sound += is_sound(name)
    rest = [name for name in rest if not (rule.every and step_of(Path(name)) % rule.every == 0)]
    if rest and rule.best:
        rest = _without_best([written, *names], rest, rule.best, is_sound, call, group)
    if rest:
        for line in group.on_first(lambda: call("remove", names=rest)):
            if group.is_first:
                say(line)


def _without_best(
    names: list[str],
    rest: list[str],
    best: int,
    is_sound: Callable[[str], bool],
    call: _Call,
    group: StoreGroup,
) -> list[str]:
    """`rest` without the best sound ones of all checkpoints, newest first. Of equal losses the
    newer is better."""
    losses = group.on_first(lambda: call("validation_losses", names=names))
    ranked = sorted((name for name in names if name in losses), key=losses.__getitem__)
    found = 0
    for name in ranked:
        if found == best:
            break
        if name == names[0] or is_sound(name):
            found += 1
            rest = [other for other in rest if other != name]
    return rest


def _faults(name: str, call: _Call, group: StoreGroup) -> bool:
    """Whether a file of the checkpoint differs from its manifest; each rank compares some."""
    try:
        faults = call("faults", name=name, rank=group.rank, world=group.world)
    except (UserError, OSError) as error:
        faults = {"": str(error)}
    found = group.collect(json.dumps(faults).encode())
    return bool(group.on_first(lambda: any(json.loads(one) for one in found)))
