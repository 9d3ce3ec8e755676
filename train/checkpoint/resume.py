"""Where a run starts: from initial weights, another run's weights, or its newest checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.errors import UserError
from configs.paths import local_path
from configs.schema import JobConfig
from parallel.ranks import Ranks
from train.checkpoint import checkpoint, retention
from train.checkpoint.config_changes import (
    compare_for_resume,
    compare_for_start,
    is_new,
    refuse_other_corpus,
    settings_then,
)
from train.checkpoint.manifest_content import short

Tensors = Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class ResumeState:
    """The state of a run when it begins."""

    done: int
    """Steps done."""
    lines: list[str]
    """Messages for the user."""
    owes_validation: bool
    """Whether a stop interrupted the validation after the last step."""


def restore(
    config: JobConfig, ranks: Ranks, facts: dict[str, str], weights: Tensors, optimizer: Tensors
) -> ResumeState:
    """Fill the live tensors and return the state of the run.

    A checkpoint of the run itself has priority over `checkpoint.init_from`. Raises UserError on all
    ranks.

    Args:
        config: The settings.
        ranks: All ranks.
        facts: Values that must be the same on resume (`corpus`, the data's fingerprint) or whose
            change is reported (`compute`, the dtype).
        weights, optimizer: Return the live tensors by name.
    """
    chosen = ranks.on_first(lambda: _choose(config, facts))
    if chosen is None:
        return ResumeState(0, [], False)
    path = Path(chosen["path"])
    manifest: checkpoint.Manifest = ranks.on_every(lambda: checkpoint.read_manifest(path))
    checkpoint.verify_files(manifest, ranks.rank, ranks.world)
    live = dict(weights())
    if chosen["own"]:
        live |= optimizer()
        if ranks.is_first:
            retention.remember(path)
    else:
        then = settings_then(manifest)
        live = {name: tensor for name, tensor in live.items() if not is_new(name, then)}
    ranks.on_every(lambda: checkpoint.load(manifest, live))
    if chosen["own"]:
        return ResumeState(manifest.step, chosen["lines"], manifest.state["owes_validation"])
    return ResumeState(0, chosen["lines"], False)


def _choose(config: JobConfig, facts: dict[str, str]) -> dict[str, Any] | None:
    """Which checkpoint to start from; rank 0 decides for all."""
    own = checkpoint.checkpoints(local_path(config.run.dir) / "checkpoints")
    init_from = config.checkpoint.init_from
    if not own:
        if not init_from:
            return None
        try:
            path = checkpoint.find(local_path(init_from)).absolute()
        except checkpoint.CheckpointError as error:
            raise UserError(f"checkpoint.init_from: {error}") from None
        lines = [f"weights from {path}; optimizer and steps start anew"]
        lines += _compare_model(checkpoint.read_manifest(path), config, facts)
        return {"path": str(path), "own": False, "lines": lines}
    lines = []
    for path in reversed(own):
        try:
            manifest = checkpoint.read_manifest(path)
        except checkpoint.CheckpointError as error:
            if path == own[0]:
                raise
            lines.append(f"passed over: {error}")
            continue
        lines += [f"resuming from {path}", *_compare(manifest, config, facts)]
        if init_from:
            lines.append(f"checkpoint.init_from = {init_from}: not used, the run has begun already")
        return {"path": str(path.absolute()), "own": True, "lines": lines}
    raise AssertionError


def _compare_model(
    manifest: checkpoint.Manifest, config: JobConfig, facts: dict[str, str]
) -> list[str]:
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


def _compare(manifest: checkpoint.Manifest, config: JobConfig, facts: dict[str, str]) -> list[str]:
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


def _state(manifest: checkpoint.Manifest) -> dict[str, Any]:
    """The state of a run's checkpoint, checked to have every entry that a run needs."""
    for key, kind in _STATE.items():
        value = manifest.state.get(key)
        if type(value) is not kind:
            raise checkpoint.CheckpointError(
                f"{manifest.folder}: state: {key} = {short(value)}: must be a {kind.__name__}"
            )
    return manifest.state
