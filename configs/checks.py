"""What must hold between the keys of an experiment, whatever the number of ranks."""

from configs.schema import ConfigError, RunConfig


def check(config: RunConfig) -> None:
    """Raise ConfigError, naming both keys, where two settings contradict each other."""
    schedule, train = config.schedule, config.train
    if schedule.warmup_steps > train.steps:
        raise ConfigError(
            f"schedule.warmup_steps = {schedule.warmup_steps}: longer than "
            f"train.steps = {train.steps}"
        )
    if schedule.kind == "wsd":
        decay = round(schedule.decay_fraction * train.steps)
        if schedule.warmup_steps + decay > train.steps:
            raise ConfigError(
                f"schedule: warmup_steps {schedule.warmup_steps} + decay {decay} "
                f"(decay_fraction x train.steps) = {schedule.warmup_steps + decay}, "
                f"more than train.steps = {train.steps}"
            )
    beyond = [step for step in train.profile_steps if not 1 <= step <= train.steps]
    if beyond:
        raise ConfigError(
            f"train.profile_steps = {beyond}: steps are numbered 1 to train.steps = {train.steps}"
        )
