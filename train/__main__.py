"""`python -m train FILE.toml [--section.key=value ...]`, alone or under torchrun.

    torchrun --nproc-per-node 2 -m train configs/demo.toml
    python -m train configs/demo.toml --check [--ranks N]

`--check` starts nothing: it prints the resolved experiment and what it needs. Exit code 2 and one
line mean that a setting cannot work.
"""

import os
import sys
import time

from configs.degrees import Degrees, default_world, resolve
from configs.loader import load
from configs.rules import ConfigError
from configs.schema import RunConfig


def main(arguments: list[str]) -> int:
    """Run or check the experiment; returns the exit code."""
    rank = int(os.environ.get("RANK", 0))
    try:
        files, overrides, check, ranks = _parse(arguments)
        config = load(files[0], overrides)
        if check:
            return _check(config, ranks)
        return _train(config, resolve(config, int(os.environ.get("WORLD_SIZE", 1))))
    except ConfigError as error:
        return _fail(rank, f"error: {error}", 2)
    except KeyboardInterrupt:
        return 130


def _parse(arguments: list[str]) -> tuple[list[str], list[str], bool, int | None]:
    usage = "usage: python -m train FILE.toml [--section.key=value ...] [--check [--ranks N]]"
    if {"-h", "--help"} & set(arguments):
        print(usage)
        raise SystemExit(0)
    files, overrides, check, ranks = [], [], False, None
    rest = iter(arguments)
    for argument in rest:
        name, _, value = argument.partition("=")
        if argument == "--check":
            check = True
        elif name == "--ranks":
            value = value or next(rest, "")
            if not value.isdigit() or int(value) < 1:
                raise ConfigError(f"--ranks {value}: must be a positive integer")
            ranks = int(value)
        elif argument.startswith("--"):
            overrides.append(argument)
        else:
            files.append(argument)
    if len(files) != 1:
        raise ConfigError(f"{len(files)} experiment files given, expected one; {usage}")
    if ranks and not check:
        raise ConfigError("--ranks: only with --check; torchrun decides how many ranks train")
    return files, overrides, check, ranks


def _check(config: RunConfig, ranks: int | None) -> int:
    from train.check import report

    world = ranks or int(os.environ.get("WORLD_SIZE", 0)) or default_world(config)
    print(report(config, resolve(config, world)))
    return 0


def _train(config: RunConfig, degrees: Degrees) -> int:
    from parallel.ranks import start_ranks, stop_ranks
    from train.step import NonFiniteError
    from train.trainer import Trainer

    ranks = start_ranks(config.train.threads)
    try:
        code = Trainer(config, degrees, ranks).run()
        stop_ranks()
        return code or 0
    except NonFiniteError as error:
        return _fail(ranks.rank, f"error: {config.run.dir}: {error}", 1)


def _fail(rank: int, line: str, code: int) -> int:
    """Print the line once. The launcher stops all ranks as soon as one exits, so the others give
    rank 0 time to speak first; if it has nothing to say, they do."""
    if rank:
        time.sleep(5)
        line = f"rank {rank}: {line}"
    print(line, file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        os._exit(code)  # other ranks may wait in a collective: do not wait for them in turn
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
