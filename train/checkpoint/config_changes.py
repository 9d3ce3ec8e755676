"""Settings that may change between a checkpoint and the run that starts from it, in one table.

A run that resumes, or starts from given weights (`checkpoint.init_from`), compares its settings
with those of the checkpoint. Some determine the meaning of the weights, some the data that a run
has already read; the others may change, and are listed.
"""

from enum import Enum
from typing import NoReturn

from configs.errors import UserError
from configs.loader import flatten, from_dict, unflatten
from configs.schema import JobConfig
from train.checkpoint.manifest import MANIFEST, CheckpointError, Manifest
from train.checkpoint.manifest_content import short
from train.optim.schedule import learning_rate, schedule_steps


class ConfigChange(Enum):
    """When a key may have another value than in the checkpoint."""

    NEVER = "it decides the tensors or what they compute"
    WITH_NEW_RUN = "weights survive it, a run does not: other data, positions or modules"
    ALWAYS = "training only: no function of the network"


_NEVER, _NEW, _ALWAYS = ConfigChange.NEVER, ConfigChange.WITH_NEW_RUN, ConfigChange.ALWAYS
CHANGES: dict[str, ConfigChange] = {
    "run.dir": _ALWAYS,
    "run.seed": _NEW,
    "model.vocab_size": _NEVER,
    "model.d_model": _NEVER,
    "model.n_layers": _NEVER,
    "model.n_dense_layers": _NEVER,
    "model.moe_every": _NEVER,
    "model.d_ff": _NEVER,
    "model.norm_eps": _NEVER,
    "model.tie_embeddings": _NEVER,
    "model.mtp_depth": _NEW,  # see `mtp_lines`
    "model.init_std": _ALWAYS,
    "model.attention": _NEVER,
    "model.rope": _NEW,  # a longer context
    "model.rope.interleaved": _NEVER,  # the order of rows in the projections
    "model.moe.n_experts": _NEVER,
    "model.moe.top_k": _NEVER,
    "model.moe.d_expert": _NEVER,
    "model.moe.n_shared_experts": _NEVER,
    "model.moe.score_func": _NEVER,
    "model.moe.n_groups": _NEVER,
    "model.moe.top_groups": _NEVER,
    "model.moe.router_bias": _NEVER,
    "model.moe.weight_on": _NEVER,
    "model.moe.expert_bias": _NEVER,
    "model.moe.activation": _NEVER,
    "model.moe.norm_top_k": _NEVER,
    "model.moe.route_scale": _NEVER,
    "model.moe.bias_update_rate": _ALWAYS,  # the bias itself is part of every checkpoint
    "model.moe.seq_aux_loss_coef": _ALWAYS,
    "model.moe.global_aux_loss_coef": _ALWAYS,
    "model.moe.router_z_loss_coef": _ALWAYS,
    "model.moe.force_balance": _NEW,
    "data": _ALWAYS,  # the resulting tokens are compared (`refuse_other_corpus`)
    "data.seq_len": _NEW,
    "data.packing": _NEW,
    "data.fim_rate": _NEW,
    "data.fim_tokens": _NEW,
    "train": _ALWAYS,
    "train.global_batch": _NEW,
    "optimizer": _ALWAYS,
    "schedule": _ALWAYS,
    "parallel": _ALWAYS,
    "precision": _ALWAYS,
    "validation": _ALWAYS,
    "checkpoint": _ALWAYS,
    "health": _ALWAYS,
}
"""A key, or a section for those of its keys that are not in the table."""


def change_of(key: str) -> ConfigChange:
    """When a dotted key may change. Raises KeyError if the table has no entry."""
    parts = key.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return CHANGES[next((prefix for prefix in prefixes if prefix in CHANGES), key)]


def settings_then(manifest: Manifest) -> JobConfig:
    """The settings of a checkpoint; keys that did not exist then have their default."""
    place = str(manifest.folder / MANIFEST)
    try:
        return from_dict(unflatten(manifest.config), place)
    except UserError as error:
        raise CheckpointError(short(str(error), len(place) + 300)) from None
    except (TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{place}: config: {short(str(error))}") from None


def compare_for_resume(then: JobConfig, config: JobConfig, done: int) -> list[str]:
    """Raise UserError for a change that is not allowed when a run resumes; list other changes.

    done: steps of the checkpoint.
    """
    told = _changed(then, config)
    fixed = [line for key, line in told.items() if change_of(key) is not ConfigChange.ALWAYS]
    if fixed:
        raise UserError(
            f"{config.run.dir}: cannot resume with another {', '.join(fixed)}; "
            "set it back, or choose another run.dir"
        )
    if done > config.train.steps:
        raise UserError(
            f"{config.run.dir}: has done {done} steps, more than "
            f"train.steps = {config.train.steps}; raise it or choose another run.dir"
        )
    lines = [f"changed since that checkpoint: {line}" for line in told.values()]
    return lines + rate_lines(then, config, done)


def refuse_other_corpus(then: JobConfig, config: JobConfig) -> NoReturn:
    """Raise UserError for a run with other tokens than those its checkpoint was trained on."""
    changed = [line for key, line in _changed(then, config).items() if key.startswith("data.")]
    if then.data.blend and config.data.blend:
        changed = ["tokenizer of the datasets of data.blend"]
    cause = (
        f"with another {', '.join(changed)}"
        if changed
        else (f"the documents of data.source = {config.data.source!r} have changed")
    )
    raise UserError(
        f"{config.run.dir}: cannot resume: {cause}: the tokens are not those of its checkpoint; "
        "choose another run.dir"
    )


def compare_for_start(then: JobConfig, config: JobConfig) -> list[str]:
    """Raise UserError for weights of another model; list other changes of model and training."""
    told = _changed(then, config)
    other = [line for key, line in told.items() if change_of(key) is ConfigChange.NEVER]
    if other:
        raise UserError(
            f"checkpoint.init_from = {config.checkpoint.init_from}: its weights belong to another "
            f"{', '.join(other)}"
        )
    lines = [line for key, line in told.items() if key.startswith("model.")]
    lines = [f"changed since those weights: {line}" for line in lines]
    return lines + mtp_lines(then.model.mtp_depth, config.model.mtp_depth)


def mtp_lines(then: int, now: int) -> list[str]:
    """Lines about the modules of multi-token prediction if their number changes."""
    modules = f"MTP modules {min(then, now) + 1} to {max(then, now)}"
    if now > then:
        return [f"{modules}: new, initialized from run.seed"]
    return [f"{modules}: left out, this run has {now}"] if now < then else []


def is_new(name: str, then: JobConfig) -> bool:
    """Whether a weight belongs to an MTP module that the checkpoint does not have."""
    section, _, rest = name.removeprefix("model.").partition(".")
    return section == "mtp" and int(rest.split(".")[0]) >= then.model.mtp_depth


def rate_lines(then: JobConfig, config: JobConfig, done: int) -> list[str]:
    """One line if the next step has another learning rate than without the changes."""
    step, was, now = done + 1, schedule_steps(then), schedule_steps(config)
    if not 1 < step <= config.train.steps:
        return []
    kept = learning_rate(then.schedule, then.optimizer.lr, step, was)
    rate = learning_rate(config.schedule, config.optimizer.lr, step, now)
    if rate == kept:
        return []
    last = learning_rate(then.schedule, then.optimizer.lr, done, was)
    line = f"learning rate: {rate:.2e} at step {step}, after {last:.2e} at step {done}"
    if was == now:
        return [line]
    line += f": the schedule is now one of {now} steps, it was one of {was}"
    if kept > 0:
        return [f"{line}; schedule.steps = {was} keeps it ({kept:.2e} at step {step})"]
    return [
        f"{line} and has ended at 0; to go on at a low rate instead, set schedule.steps = {was} "
        f"and schedule.min_lr_fraction = 0.1"
    ]


def _changed(then: JobConfig, config: JobConfig) -> dict[str, str]:
    """The keys that differ, each with a description of both values."""
    old, new = flatten(then), flatten(config)
    return {
        key: f"{key} (was {short(repr(old[key]), 300)}, is {short(repr(new[key]), 300)})"
        for key in new
        if old[key] != new[key]
    }
