"""`python -m train FILE.toml [--section.key=value ...]`, as one process or under torchrun.

    torchrun --nproc-per-node 2 -m train configs/demo.toml
    python -m train configs/demo.toml --check [--ranks N] [--stages]

`--check` trains nothing: it prints the resolved experiment, its sizes and which inputs (data,
tokenizer, initial weights) are not found; missing inputs alone leave the exit code at 0. With
`--stages` it also compares memory and communication of all ZeRO stages. Exit code 2 and one line
mean that a setting is invalid. Exit code 75: SIGTERM or SIGUSR1 stopped the run
before its last step; its state is saved, and the same command continues.
"""

import os
import sys
from pathlib import Path

from configs.errors import ConfigError, UserError
from configs.loader import load, parse_arguments
from configs.parallel_dims import ParallelDims, default_world, resolve
from configs.paths import local_path
from configs.schema import JobConfig
from parallel.allocator import restart_without_thread_cache
from parallel.launch_environment import (
    LaunchEnvironment,
    configure_libraries,
    fail,
    read_launch_environment,
    read_world,
)
from train.health.heartbeat import Heartbeat, start_heartbeat
from train.process.log_streams import use_log_streams
from train.process.stop import StopSignal, ignore_stop_signals


def main(arguments: list[str]) -> int:
    """Run or check the experiment; returns the exit code."""
    use_log_streams()
    with StopSignal() as stop:
        return _main(arguments, stop)


def _main(arguments: list[str], stop: StopSignal) -> int:
    rank = 0
    configure_libraries()
    # torch's record of collectives, which shows the late rank (`train.health.collectives`)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        check = "--check" in arguments
        placement = LaunchEnvironment() if check else read_launch_environment()
        rank = placement.rank  # before any error that all ranks raise
        rest = [argument for argument in arguments if argument not in ("--check", "--stages")]
        file, overrides, ranks = parse_arguments(rest)
        if ranks and not check:
            raise ConfigError("--ranks: only with --check; torchrun decides how many ranks train")
        if "--stages" in arguments and not check:
            raise ConfigError("--stages: only with --check")
        config = load(file, overrides)
        if check:
            return _check(config, ranks, "--stages" in arguments)
        heartbeat = start_heartbeat(rank)
        return _train(config, resolve(config, placement.world), stop, heartbeat)
    except UserError as error:
        return fail(rank, f"error: {error}", 2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return fail(rank, f"error: {ConfigError(f'{where}{error.strerror or error}')}", 2)


def _check(config: JobConfig, ranks: int | None, stages: bool) -> int:
    import torch

    from train.check import missing_inputs, report

    torch.set_num_threads(1)  # there is almost no data, and waiting threads take time
    world = ranks or read_world() or default_world(config)
    print(report(config, resolve(config, world), stages), flush=True)
    # after the sizes: the data may be missing where only the model's file is available
    missing = missing_inputs(config)
    print(*(["not found"] * bool(missing)), *(f"  {line}" for line in missing), sep="\n")
    return 0


def _train(
    config: JobConfig, parallel_dims: ParallelDims, stop: StopSignal, heartbeat: Heartbeat
) -> int:
    from parallel.dispatch.overflow import CapacityOverflow
    from parallel.ranks import start_ranks, stop_ranks, wait_for_all
    from train.atomic_files import naming
    from train.health.run_health import DifferingReplicas
    from train.health.spikes import LossSpike
    from train.health.watchdog import Watchdog
    from train.process.deterministic import use_deterministic_algorithms
    from train.step import NonFiniteError
    from train.trainer import Trainer

    if config.train.deterministic:
        use_deterministic_algorithms()
    ranks = start_ranks(config.train.threads)
    heartbeat.configure(config.health, ranks.device.type)
    watchdog = Watchdog(heartbeat, ranks, local_path(config.run.dir))
    try:
        with naming(Path(config.run.dir)):
            code = Trainer(config, parallel_dims, ranks, stop, watchdog).run()
        wait_for_all()  # a rank that still works would notice that another no longer answers
        watchdog.stop()
        stop_ranks()
        return code or 0
    except (NonFiniteError, CapacityOverflow, LossSpike, DifferingReplicas) as error:
        return fail(ranks.rank, f"error: {config.run.dir}: {error}", 1)
    except RuntimeError as error:
        if ranks.rank_monitor is not None:
            advice = "the same command resumes from the newest checkpoint"
            code = 1 if stop.number is None else stop.exit_code
            # after a signal the other ranks have ended at once, if no step was complete
            is_expected = stop.number is not None and not stop.has_step
            ranks.rank_monitor.end_if_lost(config.run.dir, advice, code, is_expected)
            watchdog.explain(error)
        raise
    finally:
        watchdog.stop()


if __name__ == "__main__":
    restart_without_thread_cache()
    returned = main(sys.argv[1:])
    ignore_stop_signals()
    sys.exit(returned)
