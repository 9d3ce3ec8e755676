"""Which state a run starts from: its newest sound checkpoint, given weights, or nothing."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.errors import UserError
from configs.paths import is_url, local_path
from configs.schema import JobConfig
from parallel.ranks import Ranks, gather_json, one_line
from parallel.shards import box_of
from train.checkpoint import checkpoint, retention
from train.checkpoint.checkpoint import CheckpointError, Manifest
from train.checkpoint.config_changes import (
    compare_for_resume,
    compare_for_start,
    is_new,
    refuse_other_corpus,
    settings_then,
)
from train.checkpoint.manifest import (
    Unavailable,
    faults_of_files,
    raise_faults,
    without_remedy,
)
from train.checkpoint.manifest_content import FOLDER_NAME, short
from train.checkpoint.storage.addresses import storage_at
from train.checkpoint.storage.base import Storage
from train.checkpoint.storage.local import LocalStorage

Tensors = Callable[[], Mapping[str, Tensor]]
_LOOKS, _PAUSE_S = 2, 0.5
"""How often a checkpoint is read before it counts as damaged: a network may fail for a moment."""


@dataclass(frozen=True)
class ResumeState:
    """The state of a run when it begins."""

    done: int
    """Steps done."""
    lines: list[str]
    """Messages for the user."""
    owes_validation: bool
    """Whether a stop interrupted the validation after the last step."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """Of the manifest; empty for a new run."""


@dataclass(frozen=True)
class Fault:
    """Why a checkpoint cannot be used."""

    text: str
    is_damage: bool
    """False if its storage did not answer: then it stays where it is."""

    def __str__(self) -> str:
        return f"{'damaged' if self.is_damage else 'not available'}, not used: {self.text}"


def restore(
    config: JobConfig,
    storage: Storage,
    ranks: Ranks,
    facts: dict[str, str],
    weights: Tensors,
    optimizer: Tensors,
) -> ResumeState:
    """Fill the live tensors and return the state of the run.

    A checkpoint of the run itself has priority over `checkpoint.init_from`. The newest one whose
    files all match its manifest is used; newer ones, which are damaged, are set aside so that no
    later start reads them. Raises UserError on all ranks.

    Args:
        config: The settings.
        storage: Where the run's checkpoints are.
        ranks: All ranks.
        facts: Values that must be the same on resume (`corpus`, the data's fingerprint) or whose
            change is reported (`compute`, the dtype).
        weights, optimizer: Return the live tensors by name.
    """
    own = ranks.on_first(storage.names)
    if own:
        return _resume(config, storage, own, ranks, facts, weights, optimizer)
    if not config.checkpoint.init_from:
        return ResumeState(0, [], False)
    return _start(config, ranks, facts, weights)


def _resume(
    config: JobConfig,
    storage: Storage,
    own: list[str],
    ranks: Ranks,
    facts: dict[str, str],
    weights: Tensors,
    optimizer: Tensors,
) -> ResumeState:
    def fill(manifest: Manifest) -> dict[str, Tensor]:
        return {**weights(), **optimizer()}

    def compare(manifest: Manifest) -> list[str]:
        return _compare(manifest, config, facts)

    name, manifest, lines, faults = _newest_sound(storage, own, ranks, compare, fill)
    said = [str(fault) for fault in faults.values()]
    damaged = [other for other, fault in faults.items() if fault.is_damage]
    said += ranks.on_first(lambda: [storage.set_aside(other) for other in damaged])
    said += [f"resuming from {storage.address(name)}", *lines]
    if ranks.is_first:
        retention.remember(storage.address(name), storage.signature(name))
    if init_from := config.checkpoint.init_from:
        said.append(f"checkpoint.init_from = {init_from}: not used, the run has begun already")
    return ResumeState(manifest.step, said, manifest.state["owes_validation"], manifest.state)


def _start(config: JobConfig, ranks: Ranks, facts: dict[str, str], weights: Tensors) -> ResumeState:
    """The state of a run that begins with the weights of `checkpoint.init_from`."""
    init_from = config.checkpoint.init_from
    root, names = ranks.on_first(lambda: _given(init_from))

    def fill(manifest: Manifest) -> dict[str, Tensor]:
        then = settings_then(manifest)
        return {name: tensor for name, tensor in weights().items() if not is_new(name, then)}

    def compare(manifest: Manifest) -> list[str]:
        return _compare_model(manifest, config, facts)

    storage = storage_at(root)
    name, _, lines, faults = _newest_sound(storage, names, ranks, compare, fill)
    said = [str(fault) for fault in faults.values()]
    address = storage.address(name)
    said += [f"weights from {address}; optimizer and steps start anew", *lines]
    return ResumeState(0, said, False)


def _given(init_from: str) -> tuple[str, list[str]]:
    """The folder and the names of the checkpoints that `checkpoint.init_from` names."""
    try:
        if is_url(init_from):
            root, _, last = init_from.rstrip("/").rpartition("/")
            if FOLDER_NAME.fullmatch(last):
                return root, [last]
            if names := storage_at(init_from).names():
                return init_from, names
            raise CheckpointError(f"{init_from}: holds no checkpoint")
        newest = checkpoint.find(local_path(init_from)).absolute()
    except CheckpointError as error:
        raise UserError(f"checkpoint.init_from: {error}") from None
    if newest == local_path(init_from).absolute():
        return str(newest.parent), [newest.name]
    return str(newest.parent), LocalStorage(newest.parent).names()


def _newest_sound(
    storage: Storage,
    names: list[str],
    ranks: Ranks,
    compare: Callable[[Manifest], list[str]],
    fill: Callable[[Manifest], Mapping[str, Tensor]],
) -> tuple[str, Manifest, list[str], dict[str, Fault]]:
    """Load the newest sound checkpoint of `names` (oldest first) into live tensors.

    Returns its name and manifest, the lines of `compare`, and the faults of the newer ones by
    name. compare: raises UserError if the settings do not allow this checkpoint; nothing is loaded
    then. fill: the live tensors to fill. Raises CheckpointError on all ranks if none is sound.
    """
    faults: dict[str, Fault] = {}
    for name in reversed(names):
        for look in range(_LOOKS):
            with _opened(storage, name, ranks, fill) as (manifest, fault):
                if manifest is not None and fault is None:
                    lines = ranks.on_first(lambda: compare(manifest))
                    fault = _fault(lambda: checkpoint.load(manifest, fill(manifest)))
                    if fault is None:
                        return name, manifest, lines, faults
            if look + 1 < _LOOKS:
                time.sleep(_PAUSE_S)
        assert fault is not None
        faults[name] = fault
    listed = "; ".join(fault.text for fault in list(faults.values())[:3])
    raise CheckpointError(
        f"{storage.address()}: no checkpoint is sound, and none is changed: {listed}; put a copy "
        "in its place, or remove them all to start anew"
    )


@contextmanager
def _opened(
    storage: Storage, name: str, ranks: Ranks, fill: Callable[[Manifest], Mapping[str, Tensor]]
) -> Iterator[tuple[Manifest | None, Fault | None]]:
    """The manifest of a checkpoint whose files have been compared with it, and its fault; all ranks
    get the same fault. Files of a remote storage are in a local folder until the end of the
    context."""
    found: list[Manifest] = []

    def read() -> None:
        manifest = storage.read_manifest(name)
        _state(manifest)
        settings_then(manifest)
        found.append(manifest)

    if fault := _fault(read):
        yield None, fault
        return
    manifest = found[0]
    if not storage.is_remote:
        yield manifest, _shared_fault(manifest, ranks)
        return
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as place:

        def fetch() -> None:
            folder = Path(place) / name
            folder.mkdir()
            needed = _needed(manifest, fill(manifest))
            storage.fetch(name, needed, folder)
            mine = {file: manifest.files[file] for file in needed}
            local = replace(manifest, folder=folder, files=mine)
            raise_faults(local, faults_of_files(local))
            found[:] = [local]

        fault = _fault(fetch)
        yield found[0], fault


def _fault(function: Callable[[], object]) -> Fault | None:
    """Run `function` on every rank; the first error of a checkpoint or file."""
    text, is_damage = "", True
    try:
        function()
    except CheckpointError as error:
        text, is_damage = without_remedy(str(error)), not isinstance(error, Unavailable)
    except OSError as error:
        text, is_damage = one_line(error), False
    found = gather_json([text, is_damage])
    is_damage = all(damage for other, damage in found if other)
    for rank, (other, _) in enumerate(found):
        if other:
            return Fault(f"rank {rank}: {other}" if rank else other, is_damage)
    return None


def _shared_fault(manifest: Manifest, ranks: Ranks) -> Fault | None:
    """The first error of the files, compared by all ranks together."""
    mine = faults_of_files(manifest, ranks.rank, ranks.world)
    faults = {file: fault for found in gather_json(mine) for file, fault in found.items()}
    return _fault(lambda: raise_faults(manifest, faults))


def _needed(manifest: Manifest, live: Mapping[str, Tensor]) -> list[str]:
    """The files that have a part of this rank's tensors."""
    needed = set()
    for name, tensor in live.items():
        box = box_of(tensor)
        for saved, file in manifest.boxes.get(name, []):
            if saved.whole == box.whole and saved.intersect(box) is not None:
                needed.add(file)
    return sorted(needed)


def _compare_model(manifest: Manifest, config: JobConfig, facts: dict[str, str]) -> list[str]:
    """Raise UserError for weights of another model; list other changes."""
    state = _state(manifest)
    lines = compare_for_start(settings_then(manifest), config)
    if state["corpus"] != facts["corpus"]:
        lines.append(
            "those weights have seen other data, in the same tokens"
            if _same_tokenizer(manifest.folder, config)
            else "those weights have seen other data; with another tokenizer they mean nothing: "
            "data.tokenizer should name that of their run"
        )
    return lines


def _same_tokenizer(checkpoint_folder: Path, config: JobConfig) -> bool:
    """Whether `data.tokenizer` is that of the run or import of this checkpoint."""
    if not config.data.tokenizer:
        return False
    ours = local_path(config.data.tokenizer)
    ours = ours / "tokenizer.json" if ours.is_dir() else ours
    theirs = checkpoint_folder.parent.parent / "tokenizer" / "tokenizer.json"
    try:
        return ours.read_bytes() == theirs.read_bytes()
    except OSError:
        return False


def _compare(manifest: Manifest, config: JobConfig, facts: dict[str, str]) -> list[str]:
    """Raise UserError for a change that is not allowed; list other changes."""
    state = _state(manifest)
    then = settings_then(manifest)
    lines = compare_for_resume(then, config, manifest.step)
    if state["corpus"] != facts["corpus"]:
        refuse_other_corpus(then, config)
    if state["compute"] != facts["compute"]:
        was, is_ = state["compute"], facts["compute"]
        lines.append(f"changed since that checkpoint: compute dtype (was {short(was)}, is {is_})")
    return lines


_STATE = {"corpus": str, "compute": str, "owes_validation": bool}


def _state(manifest: Manifest) -> dict[str, Any]:
    """The state of a run's checkpoint, checked to have every entry that a run needs."""
    for key, kind in _STATE.items():
        value = manifest.state.get(key)
        if type(value) is not kind:
            raise CheckpointError(
                f"{manifest.folder}: state: {key} = {short(value)}: must be a {kind.__name__}"
            )
    return manifest.state
