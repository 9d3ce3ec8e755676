"""Where a run starts: anew, from another run's weights, or from its own newest checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.loader import flatten, from_dict, unflatten
from configs.rules import ConfigError
from configs.schema import FIXED_ON_RESUME, RunConfig
from parallel.ranks import Ranks
from train import checkpoint

Tensors = Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Start:
    """Where a run stands when it begins."""

    done: int
    """Steps done."""
    lines: list[str]
    """What to tell the user."""
    owes_validation: bool
    """Whether a stop cut short the validation that was due after the last step."""


def restore(
    config: RunConfig, ranks: Ranks, facts: dict[str, str], weights: Tensors, optimizer: Tensors
) -> Start:
    """Fill the live tensors and say where the run stands.

    facts: what a resume must find again (`corpus`, the data's fingerprint) or tells of (`compute`,
    the dtype). weights, optimizer: give the live tensors by name. A checkpoint of the run itself
    comes before `checkpoint.init_from`. Raises ConfigError, on all ranks alike.
    """
    chosen = ranks.on_first(lambda: _choose(config, facts))
    if chosen is None:
        return Start(0, [], False)
    manifest = checkpoint.read_manifest(Path(chosen["path"]))
    checkpoint.verify_files(manifest, ranks.rank, ranks.world)
    checkpoint.load(manifest, weights())
    if chosen["own"]:
        checkpoint.load(manifest, optimizer())
        return Start(manifest.step, chosen["lines"], manifest.state["owes_validation"])
    return Start(0, chosen["lines"], False)


def _choose(config: RunConfig, facts: dict[str, str]) -> dict[str, Any] | None:
    """Which checkpoint to start from; decided by rank 0 for all."""
    own = checkpoint.checkpoints(Path(config.run.dir).expanduser() / "checkpoints")
    init_from = config.checkpoint.init_from
    if not own:
        if not init_from:
            return None
        path = checkpoint.find(Path(init_from).expanduser())
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
        return {"path": str(path), "own": True, "lines": lines}
    raise AssertionError


_FREE_WITH_NEW_OPTIMIZER = ("rope.", "init_std", "moe.bias_update_rate", "moe.force_balance")
"""Model settings that may change with given weights; the others decide what the weights mean."""


def _compare_model(
    manifest: checkpoint.Manifest, config: RunConfig, facts: dict[str, str]
) -> list[str]:
    """Refuse weights of another model; say what else is different."""
    then, now = _settings_then(manifest), flatten(config)
    changed = [key for key in now if key.startswith("model.") and then[key] != now[key]]
    told = {key: f"{key} (was {then[key]!r}, is {now[key]!r})" for key in changed}
    other = [
        told[key]
        for key in changed
        if not key.removeprefix("model.").startswith(_FREE_WITH_NEW_OPTIMIZER)
    ]
    if other:
        raise ConfigError(
            f"checkpoint.init_from = {config.checkpoint.init_from}: its weights belong to another "
            f"{', '.join(other)}"
        )
    lines = [f"changed since those weights: {line}" for line in told.values()]
    if manifest.state["corpus"] != facts["corpus"]:
        lines.append(
            "those weights have seen other data; with another tokenizer they mean nothing: "
            "data.tokenizer should name that of their run"
        )
    return lines


def _settings_then(manifest: checkpoint.Manifest) -> dict[str, Any]:
    """The flat settings of a checkpoint; keys that did not exist then have their default."""
    place = str(manifest.folder / "manifest.json")
    return flatten(from_dict(unflatten(manifest.config), place))


def _compare(manifest: checkpoint.Manifest, config: RunConfig, facts: dict[str, str]) -> list[str]:
    """Refuse a change of what must not change; describe what else is different."""
    then, now = _settings_then(manifest), flatten(config)
    changed = [key for key in now if then[key] != now[key]]
    told = {key: f"{key} (was {then[key]!r}, is {now[key]!r})" for key in changed}
    fixed = [
        told[key]
        for key in changed
        if any(key == name or key.startswith(f"{name}.") for name in FIXED_ON_RESUME)
    ]
    if fixed:
        raise ConfigError(
            f"{config.run.dir}: cannot resume with another {', '.join(fixed)}; "
            "set it back, or choose another run.dir"
        )
    if manifest.state["corpus"] != facts["corpus"]:
        raise ConfigError(
            f"{config.run.dir}: cannot resume: the documents of data.source = "
            f"{config.data.source} have changed; choose another run.dir"
        )
    if manifest.step > config.train.steps:
        raise ConfigError(
            f"{config.run.dir}: has done {manifest.step} steps, more than "
            f"train.steps = {config.train.steps}; raise it or choose another run.dir"
        )
    lines = [f"changed since that checkpoint: {told[key]}" for key in changed]
    if manifest.state["compute"] != facts["compute"]:
        was, is_ = manifest.state["compute"], facts["compute"]
        lines.append(f"changed since that checkpoint: compute dtype (was {was}, is {is_})")
    return lines
