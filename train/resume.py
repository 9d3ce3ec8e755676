"""Where a run starts: anew, from another run's weights, or from its own newest checkpoint."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from configs.loader import flatten
from configs.rules import ConfigError
from configs.schema import FIXED_ON_RESUME, RunConfig
from parallel.ranks import Ranks
from train import checkpoint

Tensors = Callable[[], Mapping[str, Tensor]]


def restore(
    config: RunConfig, ranks: Ranks, corpus: str, weights: Tensors, optimizer: Tensors
) -> tuple[int, list[str]]:
    """Fill the live tensors; returns the steps done and lines to tell the user.

    corpus: fingerprint of the data the run reads. weights, optimizer: give the live tensors by
    name. A checkpoint of the run itself comes before `checkpoint.init_from`. Raises ConfigError if
    what must not change has changed, CheckpointError if the checkpoint is damaged.
    """
    folder = Path(config.run.dir)
    own = checkpoint.checkpoints(folder / "checkpoints")
    if not own and not config.checkpoint.init_from:
        return 0, []
    path = own[-1] if own else checkpoint.find(Path(config.checkpoint.init_from))
    manifest = checkpoint.read_manifest(path)
    lines = _compare(manifest, config, corpus) if own else []
    checkpoint.verify_files(manifest, ranks.rank, ranks.world)
    checkpoint.load(manifest, weights())
    if not own:
        return 0, [f"weights from {path}; optimizer and steps start anew"]
    checkpoint.load(manifest, optimizer())
    return manifest.step, [f"resuming from {path}", *lines]


def _compare(manifest: checkpoint.Manifest, config: RunConfig, corpus: str) -> list[str]:
    """Refuse a change of what must not change; describe what else is different."""
    then, now = manifest.config, flatten(config)
    changed = [key for key in now if then.get(key) != now[key]]
    told = {key: f"{key} (was {then.get(key)!r}, is {now[key]!r})" for key in changed}
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
    if manifest.state["corpus"] != corpus:
        raise ConfigError(
            f"{config.run.dir}: cannot resume: the documents of data.source = "
            f"{config.data.source} have changed; choose another run.dir"
        )
    if manifest.step > config.train.steps:
        raise ConfigError(
            f"{config.run.dir}: has done {manifest.step} steps, more than "
            f"train.steps = {config.train.steps}; raise it or choose another run.dir"
        )
    return [f"changed since that checkpoint: {told[key]}" for key in changed]
