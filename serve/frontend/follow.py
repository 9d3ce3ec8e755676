"""What the ranks other than 0 do, and how all ranks of a server start together."""

import signal
from contextlib import suppress
from pathlib import Path

from configs.errors import UserError
from models.hf.files import read_config
from serve.engine.core import EngineOptions, make_cache, make_runner
from serve.engine.loading import Export, load_update, open_export
from serve.engine.rank_group import Command, RankGroup, handle_signals


def open_together(
    folder: Path, dtype: str, device: str, options: EngineOptions, group: RankGroup | None
) -> Export:
    """Open an export on all ranks of a group, or in one process. Raises UserError on all ranks."""
    if group is None:
        return open_export(folder, dtype, device)
    settings = {f"--{name.replace('_', '-')}": value for name, value in vars(options).items()}
    _, raw = read_config(folder)
    group.check_equal(settings | {"--dtype": dtype, "--device": device, "config.json": raw})
    export: Export = group.ranks.on_every(lambda: open_export(folder, dtype, device, group))
    return export


def follow(export: Export, options: EngineOptions) -> None:
    """Compute what rank 0 computes, until it stops. SIGINT and SIGTERM are ignored meanwhile: a
    launcher sends them to all ranks, and rank 0 ends the others."""
    group = export.group
    assert group is not None and not group.ranks.is_first
    cache = make_cache(export, options)
    runner = make_runner(export, cache, options)
    handle_signals(signal.SIG_IGN)
    group.begin()
    while True:
        with group.watched():
            command, batch, text = group.receive()
        if command == Command.STOP:
            return
        if command == Command.BEAT:
            group.beat()
        elif command == Command.COUNTS:
            runner.expert_counts()
        elif command == Command.LOAD:
            with suppress(UserError):  # rank 0 has it, too
                export = load_update(export, Path(text))
                runner = make_runner(export, cache, options)
        else:
            assert batch is not None
            recorded = command == Command.RECORDED_STEP
            runner.run(batch, lambda *_: None, (lambda _: None) if recorded else None)
