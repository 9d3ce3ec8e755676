"""What a person sees while a run goes on: a progress bar on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Progressing:
    """Shows steps out of a total, with an estimate of the time left. Used by rank 0 only."""

    def __init__(self, done: int, total: int) -> None:
        self._start, self._first, self._total = time.monotonic(), done, total
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=total, completed=done, status="")

    def __enter__(self) -> "Progressing":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False)
        else:
            print(line, flush=True)

    def step(self, step: int, status: str, as_line: bool) -> None:
        """Step `step` is done. The status moves with the bar; elsewhere it is printed if
        `as_line`."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
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
