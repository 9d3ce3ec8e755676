"""A run from its config to its last checkpoint.

`Trainer.run` is the main loop: fetch, step, report, validate, save. A step is implemented in
`train.step`, its data in `train.data.batches`, checkpoints in `train.checkpoint.saver`.
"""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from configs.config_warnings import config_warnings
from configs.errors import UserError
from configs.loader import flatten, to_toml
from configs.parallel_dims import ParallelDims
from configs.paths import local_path
from configs.schema import JobConfig
from models.counts import flops_per_token
from models.fp8 import gemm_shares
from parallel.dispatch.overflow import CapacityOverflow
from parallel.ranks import Ranks, any_rank, sum_over_ranks
from parallel.waiting import collective_time
from train.atomic_files import claim, replace_text
from train.build import build_training, shard_model
from train.checkpoint.manifest import path_of
from train.checkpoint.resume import restore
from train.checkpoint.saver import Saver, open_storage
from train.checkpoint.value_range import values_out_of_range
from train.data.batches import Batch
from train.data.open_run_data import open_run_data
from train.garbage_collection import GarbageCollection
from train.health.run_health import RunHealth
from train.health.spikes import LossSpike
from train.health.stragglers import StepTime
from train.health.watchdog import Watchdog
from train.loss import source_losses
from train.optim.optimizer import optimizer_tensors, set_learning_rate
from train.optim.schedule import learning_rate, schedule_steps
from train.process.stop import StopSignal
from train.profile import profiled
from train.report import environment
from train.report.fp8_report import Fp8Diagnosis
from train.report.metrics import FORCED_BALANCE, ROUTER_LEARNS_NOTHING
from train.report.peak_flops import peak_flops
from train.report.reporter import Reporter
from train.shared_storage import check_shared
from train.step import NonFiniteError, StepResult, train_step
from train.tokenizer.hf_files import keep_tokenizer
from train.validation import validate_sources


class _Return(Exception):
    """The run returns to its newest checkpoint; raised on all ranks together."""


class Trainer:
    """All parts of a run, built for this rank; `run` trains to the last step."""

    def __init__(
        self,
        config: JobConfig,
        parallel_dims: ParallelDims,
        ranks: Ranks,
        stop: StopSignal,
        watchdog: Watchdog,
    ) -> None:
        self.config, self.parallel_dims, self.ranks = config, parallel_dims, ranks
        self.stop, self.heartbeat = stop, watchdog.heartbeat
        self.folder = local_path(config.run.dir)
        ranks.on_first(lambda: claim(self.folder))  # before any slow step
        storage = open_storage(self.folder, config.checkpoint.dir, ranks)
        check_shared(config, ranks)
        watchdog.start()  # it writes to the folder
        sharded = shard_model(config, ranks)  # raises early for invalid settings
        self.heartbeat.enter("corpus")
        self.health = RunHealth(config, ranks, self.folder)
        self._open_data()
        self.heartbeat.enter("build")
        self.training = build_training(config, ranks, sharded)
        self.model, self.optimizer = self.training.model, self.training.optimizer
        self.fp8 = Fp8Diagnosis(self.model, config.precision.fp8)
        compute = str(self.training.compute)
        self.facts = {"corpus": self.data.fingerprint, "compute": compute}
        self.saver = Saver(storage, config.checkpoint, flatten(config), ranks)
        self.validation_loss: float | None = None
        lines = self._restore()
        if ranks.is_first:
            self._introduce(lines)

    def _restore(self) -> list[str]:
        """Load the newest checkpoint, if there is one; returns messages for the user."""
        self.heartbeat.enter("load")
        start = restore(
            self.config, self.saver.storage, self.ranks, self.facts, self._weights,
            self._optimizer_state,
        )  # fmt: skip
        self.training.fp8_weights.refresh()
        self.done = start.done
        self.saver.resume(start.done)
        self.owes_validation = start.owes_validation
        self.health.resume(self.done)
        if self.done:
            self.ranks.on_every(lambda: self.data.check_resume(start.state, self.done))
        return start.lines

    def run(self) -> int | None:
        """Train up to the last step; returns the exit code of a stop, None when complete."""
        with closing(self.saver):
            while True:
                try:
                    return self._run()
                except _Return as back:
                    self._open_data()
                    lines = self._restore()
                    if self.ranks.is_first:
                        print(f"{self.folder}: {back}", *lines, sep="\n", flush=True)

    def _run(self) -> int | None:
        total, garbage = self.config.train.steps, GarbageCollection(self.config.train.gc_every)
        settings = self.config.data
        data = self.batches.ahead(self.done + 1, total, settings.workers, settings.prefetch)
        with (
            closing(data),
            self._reporter() as report,
            self._saved_where_a_step_fails(report),
            collective_time() as waited,
        ):
            if self.owes_validation:
                report.amend(self.done, self._validate())
            for step in range(self.done + 1, total + 1):
                start, before = time.perf_counter(), waited.seconds
                self.heartbeat.enter("data", step, self.done)
                batches = self._on_device(next(data))
                fetched = time.perf_counter()
                lr = self._set_learning_rate(step)
                try:
                    with self._profile(step), self.fp8.watching(step):
                        result = self._step(step, batches)
                except NonFiniteError as error:
                    self._skip(step, error, report)
                    continue
                if result is None:
                    break
                self.stop.step_is_complete()
                self.done, end = step, time.perf_counter()
                self.heartbeat.enter("report", done=step)
                self._check(step, result)
                waiting, reading = waited.seconds - before, fetched - start
                taken = StepTime(end - start - waiting - reading, waiting, reading)
                found = self.fp8.report(step)
                validation = self._validate() if self._due(self.config.validation.every) else {}
                self.validation_loss = validation.get("validation_loss")
                report.step(
                    step, result, lr=lr, seconds=end - start, data_seconds=fetched - start,
                    validation=validation, fp8=found, checkpoint=self.saver.fields(),
                    skipped=len(self.health.skipped.steps), sources=self._of_sources(batches),
                )  # fmt: skip
                report.say_all(self.health.time(step, taken))
                self.saver.poll()
                if step < total and (self._due(self.config.checkpoint.every) or self.saver.is_owed):
                    self._save(report, beside_training=True)
                report.say_all(self.saver.lines())
                garbage.run(step)
            self._save(report, keep_all=self.health.skipped.ends_with(self.done))
            self.heartbeat.enter("end")
            for picture in report.draw():
                report.say(f"drew {picture}")
        return None if self.done == total and not self.owes_validation else self.stop.exit_code

    def _step(self, step: int, batches: list[Batch]) -> StepResult | None:
        """One optimizer step; None if a signal stopped it."""
        train = self.config.train
        return train_step(
            self.model, self.optimizer, batches, step=step, rank=self.ranks.rank,
            tp_size=self.parallel_dims.tp, clip_norm=train.clip_norm,
            mtp_weight=train.mtp_weight, z_loss_coef=train.z_loss_coef,
            stop=self._stops, updated=self.training.fp8_weights.refresh,
            phase=self._enter, accumulation=self.training.accumulation,
        )  # fmt: skip

    def _enter(self, phase: str) -> None:
        """Begin a phase of a step."""
        if phase == "optimizer":
            self.stop.save_first()
        self.heartbeat.enter(phase)

    def _open_data(self) -> None:
        """Open the data, without what the run leaves out."""
        config, dims, ranks = self.config, self.parallel_dims, self.ranks
        skipped = self.health.left_out.skipped
        self.data = open_run_data(config, ranks, skipped, lambda line: print(line, flush=True))
        self.batches = self.data.training(
            config.train.micro_batch, dims.data_rank(ranks.rank), dims.data_ranks,
            pin=ranks.device.type == "cuda",
        )  # fmt: skip

    def _on_device(self, batches: list[Batch]) -> list[Batch]:
        by_source = self.data.by_source
        return [batch.to(self.ranks.device, with_losses=by_source) for batch in batches]

    def _check(self, step: int, result: StepResult) -> None:
        """Raise an error if replicas differ; return to a checkpoint if the loss is a spike."""
        every = self.config.health.replica_check_every
        if every and step % every == 0:
            self.health.check_replicas(step, self._state)
        try:
            self.health.losses.add(step, result.loss)
        except LossSpike as spike:
            self.saver.finish()
            raise _Return(self.health.roll_back(spike, step, self.saver.saved)) from None

    def _state(self) -> dict[str, torch.Tensor]:
        return self._weights() | self._optimizer_state()

    def _skip(self, step: int, error: NonFiniteError, report: Reporter) -> None:
        """Leave out the update of a step. Raises the error if that is not allowed.

        No checkpoint is written before the next sound step: it would replace an older one, and the
        weights may be the cause.
        """
        self.health.skipped.add(step, error)
        self.optimizer.zero_grad()
        self.done = step
        skipped = len(self.health.skipped.steps)
        report.say(f"{error}: skipped, {skipped} so far in this run")
        if self._due(self.config.validation.every):
            report.amend(step, self._validate())

    def _stops(self) -> bool:
        """Whether any rank received a signal to stop; the same on all ranks."""
        return any_rank(self.stop.number is not None)

    def _stops_validation(self) -> bool:
        self.heartbeat.enter("validation")
        return self._stops()

    def _set_learning_rate(self, step: int) -> float:
        schedule, peak = self.config.schedule, self.config.optimizer.lr
        lr = learning_rate(schedule, peak, step, schedule_steps(self.config))
        set_learning_rate(self.optimizer, lr)
        return lr

    def _due(self, every: int) -> bool:
        return self.done == self.config.train.steps or (every > 0 and self.done % every == 0)

    def _of_sources(self, batches: list[Batch]) -> dict[str, float]:
        """Losses of the step, tokens and epochs by source; nothing for one unnamed source."""
        if not self.data.by_source:
            return {}
        sums = source_losses(batches, len(self.data.sources))
        return self.data.step_fields(self.done, sum_over_ranks(sums), self.parallel_dims.tp)

    def _validate(self) -> dict[str, float]:
        fields = validate_sources(
            self.model, self.data.validated, self.config.validation.sequences,
            self.config.train.micro_batch, self.ranks.device,
            self.parallel_dims.data_rank(self.ranks.rank), self.parallel_dims.data_ranks,
            self._stops_validation, self.parallel_dims.tp,
        )  # fmt: skip
        self.owes_validation = fields is None
        return fields or {}

    def _save(
        self, report: Reporter, *, beside_training: bool = False, keep_all: bool = False
    ) -> None:
        """Write the checkpoint of the last complete step, unless it exists.

        beside_training: do not wait until it is written. keep_all: remove no older one. Raises
        NonFiniteError instead of saving values that are not finite.
        """
        if not beside_training:
            self.saver.finish()
            report.say_all(self.saver.lines())
        if self.done == self.saver.saved:
            return
        self.heartbeat.enter("save")
        self.health.check_replicas(self.done, self._state)
        weights, others = self._weights(), self._optimizer_state()
        if bad := values_out_of_range(weights, others):
            raise NonFiniteError(
                f"step {self.done}: {bad} afterwards; not saved, stopped before the optimizer step "
                f"of step {self.done + 1}",
                weights_are_good=False,
            )
        report.flush()
        state = {"step": self.done, "owes_validation": self.owes_validation, **self.facts}
        state |= self.data.state(self.done)
        if self.validation_loss is not None and math.isfinite(self.validation_loss):
            state["validation_loss"] = self.validation_loss
        if beside_training:
            self.saver.save(weights | others, state)
        else:
            self.saver.save_now(weights | others, state, keep_all)
        report.say_all(self.saver.lines())

    @contextmanager
    def _saved_where_a_step_fails(self, report: Reporter) -> Iterator[None]:
        """If the next step fails, save the state after the last one, if that is sound.

        Removes no older checkpoint: these weights may be the cause.
        """
        try:
            yield
        except (NonFiniteError, CapacityOverflow) as error:
            try:
                if not isinstance(error, NonFiniteError) or error.weights_are_good:
                    self._save(report, keep_all=True)
                else:
                    self.saver.finish()
            except (NonFiniteError, UserError) as unsaved:
                report.say(f"not saved: {unsaved}")
            report.say_all(self.saver.lines())
            error.args = (f"{error}; {self._newest()}",)
            raise

    def _newest(self) -> str:
        if not self.saver.saved:
            return "there is no checkpoint yet"
        newest = self.saver.storage.address(path_of(Path(), self.saver.saved).name)
        return f"the newest checkpoint is {newest}"

    def _weights(self) -> dict[str, torch.Tensor]:
        state = self.model.state_dict(keep_vars=True)
        return {f"model.{name}": tensor for name, tensor in state.items()}

    def _optimizer_state(self) -> dict[str, torch.Tensor]:
        tensors = optimizer_tensors(self.optimizer)
        return {f"optimizer.{name}": tensor for name, tensor in tensors.items()}

    def _introduce(self, start: list[str]) -> None:
        """Print how the run starts, and save config, tokenizer and environment with it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / "config.toml", to_toml(self.config))
        data = self.config.data
        keep_tokenizer(
            self.data.tokenizer_file,
            self.folder / "tokenizer",
            data.seq_len,
            trains_on=bool(self.config.checkpoint.init_from),
        )
        described = environment.describe(self.ranks, self.parallel_dims, self.training.compute)
        lines = [*start, *self.data.lines, *environment.record(self.folder, described)]
        moe = self.config.model.moe
        forced = [FORCED_BALANCE] if moe.force_balance else []
        frozen = [] if moe.router_learns else [ROUTER_LEARNS_NOTHING]
        shares = gemm_shares(self.model, self.config.data.seq_len)
        fp8 = [str(shares)] if shares.fp8 else []
        mesh = " x ".join(f"{axis} {size}" for axis, size, _ in self.parallel_dims.table())
        print(
            f"{self.folder}: {self.ranks.world} ranks ({mesh}), {self.ranks.device.type}, "
            f"{str(self.training.compute).removeprefix('torch.')}, "
            f"{torch.get_num_threads()} threads per rank",
            *fp8,
            *forced,
            *frozen,
            *config_warnings(self.config),
            *lines,
            sep="\n",
            flush=True,
        )

    def _reporter(self) -> Reporter:
        return Reporter(
            self.folder,
            self.ranks,
            done=self.done,
            total=self.config.train.steps,
            log_every=self.config.train.log_every,
            flops_per_token=flops_per_token(self.config.model, self.config.data.seq_len),
            peak_flops=peak_flops(self.ranks.device),
            force_balance=self.config.model.moe.force_balance,
        )

    def _profile(self, step: int) -> AbstractContextManager[Any]:
        if step not in self.config.train.profile_steps:
            return nullcontext()
        return profiled(
            self.folder / "profile" / f"step-{step:08d}-rank-{self.ranks.rank:05d}.json"
        )
