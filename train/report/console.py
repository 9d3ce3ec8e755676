"""Console output of a run: a progress bar on a terminal, plain lines otherwise."""

import sys
import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class ProgressPrinter:
    """Shows steps out of a total, with an estimate of the remaining time. Used by rank 0 only."""

    def __init__(self, done: int, total: int) -> None:
        self._start, self._first, self._total = time.monotonic(), done, total
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                expand=True,
            )
            self._task = self._bar.add_task("", total=total, completed=done)
            self._status = Text(no_wrap=True, overflow="ellipsis")
            self._live = Live(Group(self._bar, self._status), console=self._console)

    def __enter__(self) -> "ProgressPrinter":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """Print a separate line."""
        if self._live is not None:
            self._console.print(line, markup=False)
        else:
            print(line, flush=True)

    def step(self, step: int, status: str, as_line: bool) -> None:
        """Show that step `step` is complete. The status is part of the bar; without a terminal it
        is printed if `as_line`."""
        if self._live is not None:
            self._bar.update(self._task, completed=step)
            self._status.plain = status
        elif as_line:
            print(
                f"step {step:>{len(str(self._total))}}/{self._total}  {status}  "
                f"eta {self._eta(step)}",
                flush=True,
            )

    def _eta(self, step: int) -> str:
        per_step = (time.monotonic() - self._start) / max(step - self._first, 1)
        minutes, seconds = divmod(round(per_step * (self._total - step)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
