"""Metrics of a run: one set of scalar fields per step, written to metrics.jsonl and TensorBoard.

| field | meaning |
|---|---|
| loss, grad_norm, lr | mean training loss (nats per token), gradient norm before clipping, rate |
| tokens_per_s, step_s | tokens of the step per second, seconds of the step |
| data_share | share of the step's time spent waiting for data |
| mfu | model FLOP/s over the device's peak (CUDA only) |
| memory_gib | largest allocation so far on CUDA, resident memory elsewhere |
| mtp_loss_k | mean training loss of MTP module k, which predicts the (k+1)-th next token |
| router/sequence_balance, router/global_balance, router/router_z | the auxiliary losses in use, without their coefficients, mean over layers; 1 is a balanced load |
| force_balance | 1 if `model.moe.force_balance` routed the tokens; otherwise absent |
| moe/layer_i/max_vio | (largest load - mean load) / mean load (arXiv:2408.15664) |
| moe/layer_i/load_entropy | entropy of the load over ln E: 1 is perfect balance |
| moe/layer_i/dead_experts | experts without a single token in the step |
| moe/layer_i/rows_sent, ... | the exchange of rows: see parallel/dispatch/stats.py |
| fp8/NAME/... | FP8 error of a weight, at the reported steps: see train/report/fp8_report.py |
| checkpoint/blocked_s | seconds that the loop waited for checkpoints since the last record |
| checkpoint/write_s, checkpoint/failures | seconds and failed attempts of a save that ended |
| skipped_steps | steps of the run whose update was left out; absent if none. They have no record of their own |
| loss/NAME | mean training loss of the tokens of a source of `data.blend` |
| data/NAME/tokens, data/NAME/epochs | tokens read of it so far, and passes over it |
| validation_loss, validation_bits_per_byte | at steps with validation, over all sets |
| validation_loss/NAME, validation_perplexity/NAME, validation_bits_per_byte/NAME | of the set of one source; bits per byte where the size of the text is known |

Layers are those with experts, counted from 0, MTP modules last.

The load of every expert is written to expert_load.jsonl, from which experts.png is drawn.
"""  # noqa: E501

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from train.atomic_files import replace_text, set_aside
from train.report.record_file import RecordFile
from train.step import StepResult

if TYPE_CHECKING:
    from train.report.event_file import EventFile

FORCED_BALANCE = "FORCED BALANCE: a benchmark, tokens go round-robin and the router learns nothing"
"""Warning in every report of a run with `model.moe.force_balance`."""
ROUTER_LEARNS_NOTHING = (
    "router: the loss has no gradient for it (model.moe.norm_top_k = true with top_k = 1: one "
    "score divided by itself is 1 for every router)"
)
METRICS, EXPERT_LOAD = "metrics.jsonl", "expert_load.jsonl"
PICTURES = LOSS_PICTURE, EXPERTS_PICTURE = "loss.png", "experts.png"


def loss_fields(result: StepResult) -> dict[str, float]:
    """The losses of one step, and its gradient norm."""
    fields = {"loss": result.loss, "grad_norm": result.grad_norm}
    fields |= {f"mtp_loss_{k}": loss for k, loss in enumerate(result.mtp_losses, start=1)}
    return fields | {f"router/{name}": value for name, value in result.router_losses.items()}


def balance_fields(counts_LE: Tensor) -> dict[str, float]:
    """The moe/... fields of one step from its global choices per layer and expert."""
    fields: dict[str, float] = {}
    for i, load_E in enumerate(counts_LE.double()):
        mean = load_E.mean()
        share_E = load_E / load_E.sum()
        entropy = -(share_E * share_E.clamp(min=1e-30).log()).sum() / math.log(max(len(load_E), 2))
        fields[f"moe/layer_{i}/max_vio"] = float(load_E.max() / mean - 1)
        fields[f"moe/layer_{i}/load_entropy"] = float(entropy)
        fields[f"moe/layer_{i}/dead_experts"] = float((load_E == 0).sum())
    return fields


def memory_gib(device: torch.device) -> float:
    """Memory of this process: peak allocated on CUDA, resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # no /proc, as on macOS
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


class MetricsWriter:
    """Appends to the files of a run; steps after `last_step` of an earlier attempt are removed.

    The files are records, not state: damaged ones are renamed, and `lines` contains messages about
    them.
    """

    def __init__(self, folder: Path, last_step: int) -> None:
        self.lines = [
            line
            for name in (METRICS, EXPERT_LOAD)
            for line in _keep_until(folder / name, last_step)
        ]
        board = folder / "tensorboard"
        if os.path.lexists(board) and not board.is_dir():
            self.lines.append(set_aside(board))
        for picture in (folder / name for name in PICTURES):  # overwritten at the end
            if os.path.lexists(picture) and not picture.is_file():
                self.lines.append(set_aside(picture))
        self._metrics, self._loads = RecordFile(folder / METRICS), RecordFile(folder / EXPERT_LOAD)
        self._board = _tensorboard(board, last_step)
        self._trouble = dict[str, str]()

    def write(self, step: int, fields: dict[str, float], counts_LE: Tensor) -> None:
        """Record one step."""
        self._metrics.write(_line({"step": step, **fields}))
        self._loads.write(_line({"step": step, "load": counts_LE.long().tolist()}))
        self._board.scalars(fields, step)

    def histograms(self, step: int, values: dict[str, Tensor]) -> None:
        """Write histograms of the values to TensorBoard."""
        for name, tensor in values.items():
            self._board.histogram(name, tensor, step)

    def amend(self, step: int, fields: dict[str, float]) -> None:
        """Add fields to a step that is already recorded."""
        path = self._metrics.path
        self._metrics.close()
        why = self._metrics.error
        if not why:
            lines = [line | fields if line["step"] == step else line for line in read_lines(path)]
            try:
                replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))
            except OSError as error:
                why = error.strerror or str(error)
        if why:
            self.lines.append(f"{path}: the validation of step {step} cannot be recorded: {why}")
        self._metrics = self._metrics.reopened()
        self._board.scalars(fields, step)

    def flush(self) -> None:
        """Write everything so far to the operating system."""
        for file in self._files:
            file.flush()

    def trouble(self) -> list[str]:
        """A message for each file that can no longer be written, or can be again; each once."""
        said, self.lines = self.lines, []
        for file in self._files:
            place, before = str(file.path), self._trouble.get(str(file.path), "")
            if file.error and not before:
                said.append(f"{place}: cannot be written: {file.error}; training continues, its "
                            "records wait in memory")  # fmt: skip
            elif before and not file.error:
                lost = f"; {file.lost} records are lost" if file.lost else ""
                said.append(f"{place}: is written again{lost}")
            self._trouble[place] = file.error
        return said

    def close(self) -> None:
        for file in self._files:
            file.close()

    @property
    def _files(self) -> list[RecordFile]:
        return [self._metrics, self._loads, self._board.file]


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record) + "\n").encode()


def _tensorboard(folder: Path, last_step: int) -> "EventFile":
    from train.report.event_file import EventFile

    return EventFile(folder, last_step + 1)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a run's JSONL file, without damaged lines and one that a kill truncated."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The records of a file, and its damaged lines."""
    if not path.is_file():
        return [], []
    lines = path.read_bytes().split(b"\n")[:-1]  # text after the last newline is incomplete
    records, damaged = [], []
    for line in lines:
        record = _record(line, path.name)
        if record is None:
            damaged.append(line)
        else:
            records.append(record)
    return records, damaged


def _record(line: bytes, name: str) -> dict[str, Any] | None:
    """The record in a line; None if it is not one that `MetricsWriter.write` writes."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    if name == EXPERT_LOAD:
        return record if _is_table(record.get("load")) else None
    is_known = {"loss", "lr"} <= record.keys()
    return record if is_known and all(map(_is_number, record.values())) else None


def _is_table(rows: object) -> bool:
    """Whether `rows` are lists of integers, all of the same length."""
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        return False
    return len({len(row) for row in rows}) <= 1 and all(type(n) is int for r in rows for n in r)


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _keep_until(path: Path, last_step: int) -> list[str]:
    """Remove later steps, and move damaged lines to a separate file; returns messages."""
    said = []
    if os.path.lexists(path) and not path.is_file():
        said = [set_aside(path)]
    records, damaged = _read(path)
    if damaged:
        aside = path.with_name(f"{path.name}.damaged")
        if os.path.lexists(aside) and not aside.is_file():
            set_aside(aside)
        with aside.open("ab") as file:
            file.writelines(line + b"\n" for line in damaged)
        said.append(f"{path}: {len(damaged)} damaged lines, moved to {aside.name}")
    kept = [record for record in records if record["step"] <= last_step]
    replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return said
