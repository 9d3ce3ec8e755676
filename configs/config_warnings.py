"""Warnings about valid settings that have no effect or an unusual one.

A run prints them when it starts, and so does `--check`: no setting is ignored silently.
"""

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from configs.rules import shown
from configs.schema import JobConfig

_USUAL_LR = 1.0


def config_warnings(config: JobConfig) -> list[str]:
    """One line per such setting, which begins with the key."""
    return [*_of_model(config), *_of_training(config)]


def _of_model(config: JobConfig) -> Iterator[str]:
    model, a, rope = config.model, config.model.attention, config.model.rope
    n_moe = sum(map(model.is_moe, range(model.n_layers)))
    if not n_moe:
        yield (
            f"model.n_dense_layers = {model.n_dense_layers}, model.moe_every = {model.moe_every}: "
            f"none of the {model.n_layers} layers has experts; this is a dense model, and "
            "[model.moe] has no effect"
        )
    if n_moe == model.n_layers:
        yield from _unused(model, "model", "no layer is dense", "d_ff")
    if a.local == "none" and a.rope_on_full:
        yield from _unused(
            a, "model.attention", "local = none, and all layers have RoPE", "full_every"
        )
    if a.local != "none" and a.full_every == 1:
        yield f"model.attention.local = {a.local}: no effect (full_every = 1: every layer is full)"
    if a.rope_on_full or not a.temperature_floor:
        keys = ("temperature_floor", "temperature_scale")
        why = "rope_on_full = true" if a.rope_on_full else "temperature_floor = 0"
        yield from _unused(a, "model.attention", why, *keys)
    if bool(rope.mscale) != bool(rope.mscale_all_dim):
        yield (
            f"model.rope.mscale = {rope.mscale}, mscale_all_dim = {rope.mscale_all_dim}: cos and "
            "sin get the scale of the paper (a ratio of both needs both)"
        )


def _of_training(config: JobConfig) -> Iterator[str]:
    if not config.model.mtp_depth:
        yield from _unused(config.train, "train", "model.mtp_depth = 0", "mtp_weight")
    saves, validations = config.checkpoint.every, config.validation.every
    if not saves or not validations or math.lcm(saves, validations) >= config.train.steps:
        why = f"no step before the last has a validation and a checkpoint: every = {saves}"
        why += f", validation.every = {validations}"
        yield from _unused(config.checkpoint, "checkpoint", why, "keep_best")
    if config.schedule.kind != "wsd":
        why = f"kind = {config.schedule.kind}"
        yield from _unused(config.schedule, "schedule", why, "decay_fraction")
    parallel, dispatch = config.parallel, config.parallel.dispatch
    if parallel.recompute != "selective":
        why = f"recompute = {parallel.recompute}"
        yield from _unused(parallel, "parallel", why, "recompute_keep")
    if dispatch.kind != "sync_free":
        keys = ("capacity_factor", "on_overflow")
        yield from _unused(dispatch, "parallel.dispatch", f"kind = {dispatch.kind}", *keys)
    if config.optimizer.lr > _USUAL_LR:
        yield (
            f"optimizer.lr = {config.optimizer.lr}: unusual; AdamW moves every weight by about as "
            "much per step (usual: 1e-5 to 1e-2)"
        )


def _unused(section: Any, name: str, why: str, *keys: str) -> Iterator[str]:
    """Yield a line for each of the keys that is not at its default."""
    defaults = {spec.name: spec.default for spec in fields(section)}
    for key in keys:
        value = getattr(section, key)
        if value != defaults[key]:
            yield f"{name}.{key} = {shown(value)}: no effect ({why})"
