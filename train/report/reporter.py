"""Rank 0's output and records of a run; the reporters of other ranks do nothing."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from parallel.ranks import Ranks
from train.report.console import ProgressPrinter
from train.report.fp8_report import Fp8Report
from train.report.metrics import (
    FORCED_BALANCE,
    MetricsWriter,
    balance_fields,
    loss_fields,
    memory_gib,
)
from train.report.plots import draw
from train.step import StepResult

_OF_SOURCE = "validation_loss/"


class Reporter:
    """Progress on the console, records in the run's folder, pictures at the end."""

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        *,
        done: int,
        total: int,
        log_every: int,
        flops_per_token: float,
        peak_flops: float | None,
        force_balance: bool,
    ) -> None:
        self.folder, self.device, self.active = folder, ranks.device, ranks.is_first
        self.done, self.total, self.log_every = done, total, log_every
        self.flops_per_token, self.force_balance = flops_per_token, force_balance
        self.peak_flops = peak_flops * ranks.world if peak_flops else None

    def __enter__(self) -> "Reporter":
        if self.active:
            self._writer = MetricsWriter(self.folder, self.done)
            self._progress = ProgressPrinter(self.done, self.total).__enter__()
            self.say_all(self._writer.trouble())
        return self

    def __exit__(self, *error: object) -> None:
        if self.active:
            self._progress.__exit__(*error)
            self._writer.close()

    def step(
        self,
        step: int,
        result: StepResult,
        *,
        lr: float,
        seconds: float,
        data_seconds: float,
        validation: dict[str, float],
        fp8: Fp8Report | None = None,
        checkpoint: dict[str, float] | None = None,
        skipped: int = 0,
        sources: Mapping[str, float] | None = None,
    ) -> None:
        """Record one step. `seconds`: the whole step without validation and checkpoint. skipped:
        steps of the run without an update so far. sources: fields by source of the data."""
        if not self.active:
            return
        speed = result.tokens / seconds
        fields = {
            **loss_fields(result),
            "lr": lr,
            "tokens_per_s": speed,
            "step_s": seconds,
            "data_share": data_seconds / seconds,
            "memory_gib": memory_gib(self.device),
        }
        if self.peak_flops:
            fields["mfu"] = speed * self.flops_per_token / self.peak_flops
        if self.force_balance:
            fields["force_balance"] = 1.0
        if skipped:
            fields["skipped_steps"] = float(skipped)
        fields |= sources or {}
        fields |= validation | balance_fields(result.counts_LE) | result.dispatch
        fields |= ({} if fp8 is None else fp8.fields) | (checkpoint or {})
        self._writer.write(step, fields, result.counts_LE)
        as_line = step % self.log_every == 0 or step == self.total or step == self.done + 1
        self._progress.step(step, _status(fields), as_line)
        if fp8 is not None:
            self._writer.histograms(step, fp8.histograms)
            for line in fp8.lines:
                self._progress.say(f"step {step}: {line}")
        if validation:
            self._say_validation(step, validation)
        self.say_all(self._writer.trouble())

    def amend(self, step: int, validation: dict[str, float]) -> None:
        """Add the validation of a step that was recorded without it."""
        if self.active and validation:
            self._writer.amend(step, validation)
            self.say_all(self._writer.trouble())
            self._say_validation(step, validation)

    def say(self, line: str) -> None:
        """Print one line for the user."""
        if self.active:
            self._progress.say(line)

    def say_all(self, lines: Iterable[str]) -> None:
        """Print several lines for the user."""
        for line in lines:
            self.say(line)

    def _say_validation(self, step: int, validation: dict[str, float]) -> None:
        bits = validation.get("validation_bits_per_byte")
        line = f"step {step}: validation loss {validation['validation_loss']:.4f}"
        line += "" if bits is None else f" ({bits:.3f} bits per byte)"
        of = [(k.partition("/")[2], v) for k, v in validation.items() if k.startswith(_OF_SOURCE)]
        line += f"  {', '.join(f'{name} {loss:.4f}' for name, loss in of)}" if len(of) > 1 else ""
        self._progress.say(line + (f"  {FORCED_BALANCE}" if self.force_balance else ""))

    def flush(self) -> None:
        """Ensure that records up to now survive a kill; called before every checkpoint."""
        if self.active:
            self._writer.flush()

    def draw(self) -> list[Path]:
        """Draw the pictures from the records."""
        self.flush()
        return draw(self.folder) if self.active else []


def _status(fields: dict[str, Any]) -> str:
    parts = [
        f"loss {fields['loss']:.4f}",
        f"lr {fields['lr']:.2e}",
        f"grad {fields['grad_norm']:.2f}",
        f"{fields['tokens_per_s']:,.0f} tok/s",
        f"mem {fields['memory_gib']:.2f} GiB",
    ]
    parts += [f"mtp {fields[name]:.4f}" for name in fields if name.startswith("mtp_loss_")]
    if "mfu" in fields:
        parts.append(f"mfu {fields['mfu']:.1%}")
    if fields["data_share"] > 0.02:
        parts.append(f"data {fields['data_share']:.0%}")
    worst = [value for name, value in fields.items() if name.endswith("/max_vio")]
    if worst:
        parts.append(f"max_vio {max(worst):.2f}")
    if "force_balance" in fields:
        parts.append("FORCED BALANCE")
    return "  ".join(parts)
